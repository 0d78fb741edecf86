"""The list of models through the real client."""

import threading
from pathlib import Path

import httpx
import openai
import pytest

from serve_app.openai.models import _base_models
from tests.serve_app.live_server import MODEL, Server
from tests.tiny_models import make_tiny_model
from trainers.models import smollm2
from trainers.models.names import ALIASES
from trainers.settings import Settings


def test_a_directory_that_can_not_be_looked_into_is_no_model_and_hides_no_other(tmp_path: Path) -> None:
    whole = make_tiny_model(tmp_path / "whole")
    deep = tmp_path / "deep"
    while len(str(deep)) < 4086:  # with /config.json in it: longer than a path may be, for root as well
        deep /= "d" * min(200, 4086 - len(str(deep)))
    deep.mkdir(parents=True)
    settings = Settings(storage=tmp_path / "storage", model_roots=(deep, tmp_path))
    assert [model.id for model in _base_models(settings)] == [str(whole), *ALIASES]


def test_base_models_are_the_aliases_and_the_directories_that_local_models_may_lie_in(
    server: Server, client: openai.OpenAI
) -> None:
    root = server.parts.settings.storage
    mine = make_tiny_model(root / "mine")
    kept = make_tiny_model(server.parts.settings.model_cache / "kept")
    (root / "empty").mkdir()
    listed = {model.id: model for model in client.models.list()}
    assert listed.keys() == {*ALIASES, str(mine), str(kept)}
    assert all(model.object == "model" for model in listed.values())
    assert listed[str(mine)].created == int((mine / "config.json").stat().st_mtime)
    assert listed[MODEL].owned_by == "HuggingFaceTB"
    for name in (MODEL, str(mine)):
        assert client.models.retrieve(name) == listed[name]
    assert client.models.retrieve(mine.as_uri()).created == listed[str(mine)].created


def test_the_converted_demo_model_is_listed_by_its_alias_only(tmp_path: Path) -> None:
    settings = Settings(storage=tmp_path)
    assert {model.created for model in _base_models(settings)} == {0}
    mine = make_tiny_model(settings.model_cache / f"{MODEL}-tickets")
    converted = [make_tiny_model(settings.model_cache / name) for name in (smollm2.conversion_name(), f"{MODEL}-0.1-1")]
    for root in ((), (settings.model_cache,)):
        settings = Settings(storage=tmp_path, model_roots=root)
        listed = {model.id: model for model in _base_models(settings)}
        assert listed.keys() == {*ALIASES, str(mine)}
        assert listed[MODEL].created == max(int(directory.stat().st_mtime) for directory in converted)


def test_a_model_of_a_hub_is_there_once_it_was_fetched(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="first trained or asked"):
        client.models.retrieve("org/name")
    (server.parts.settings.model_cache / "hub" / "org--name").mkdir(parents=True)
    assert client.models.retrieve("org/name").owned_by == "org"


def test_a_hub_id_of_any_length_is_a_404(server: Server, client: openai.OpenAI) -> None:
    (server.parts.settings.model_cache / "hub").mkdir(parents=True, exist_ok=True)
    for name in (f"org/{'b' * 300}", f"org/name@{'b' * 300}", f"{'b' * 96}/{'b' * 96}"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


@pytest.mark.parametrize("name", ["gpt-4o", "/etc", "ft:x:y:z:01ARZ3NDEKTSV4RRFFQ69G5FAV"])
def test_an_unknown_model_is_a_404(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve(name)
    assert refused.value.param == "model"


def test_models_can_t_be_deleted(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.models.delete(MODEL)
    assert (refused.value.status_code, refused.value.code) == (405, "method_not_allowed")


def test_a_model_s_name_may_hold_anything_a_path_may(server: Server) -> None:
    for name in ("%2Fetc", "..%2F..%2Fx", "a%00b", "%F0%9F%98%80"):
        answer = httpx.get(f"{server.url}/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_a_storage_that_is_slow_to_say_whether_a_checkpoint_is_there_holds_up_no_other_request(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = server.submit()
    server.train(job_id, 10)
    (point,) = client.fine_tuning.jobs.checkpoints.list(job_id)

    async def this_thread() -> int:
        return threading.get_ident()

    looking, is_dir = set[int](), Path.is_dir

    def looked_for(path: Path) -> bool:
        if job_id in str(path):
            looking.add(threading.get_ident())
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", looked_for)
    with pytest.raises(openai.NotFoundError, match="no longer in the storage"):
        client.chat.completions.create(model=point.id, messages=[{"role": "user", "content": "Hi"}])
    assert looking
    assert server.do(this_thread()) not in looking

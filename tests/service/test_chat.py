"""The result of a job is usable at once, on real Ray Serve: asked, listed, downloaded; and idle models go."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.asking import ASKED, MAX_TOKENS, ask, client_of, streamed
from tests.generated import generated
from tests.service.conftest import CPUS, Api
from tests.tiny_models import make_tiny_model
from tests.waiting import WAIT_S, eventually


@pytest.fixture(scope="module")
def client(api: Api) -> openai.OpenAI:
    return client_of(api.service.url, 2 * WAIT_S)


@pytest.fixture(scope="module")
def tuned_job(api: Api) -> dict[str, Any]:
    """It has ended, with two checkpoints."""
    return api.until_status(api.submit(api.config(fine_tuning_options={"n_epochs": 2})), "success")


def greedy(directory: Path) -> str:
    return generated(directory, ASKED, max_new_tokens=MAX_TOKENS)[1]


def replicas(api: Api) -> list[psutil.Process]:
    """The processes that hold models."""
    return api.processes("ServeReplica", "chat")


def test_a_job_s_model_answers_at_once_by_its_name_though_jobs_hold_every_cpu(
    api: Api, client: openai.OpenAI, tuned_job: dict[str, Any]
) -> None:
    assert replicas(api) == []
    holding = api.submit(api.endless(overrides=f"--nproc_per_node {CPUS}"))
    api.until_status(holding, "running")
    directories = [Path(uri.removeprefix("file://")) for uri in tuned_job["checkpoints"]]
    tuned = client.fine_tuning.jobs.retrieve(tuned_job["job_id"]).fine_tuned_model
    assert tuned is not None
    listed = [model.id for model in client.models.list()]
    assert tuned in listed
    assert str(api.model) in listed
    assert client.models.retrieve(str(api.model)).id == str(api.model)

    expected = greedy(directories[-1] / "merged")
    assert ask(client, tuned) == expected != greedy(api.model)
    assert streamed(client, tuned) == expected
    assert ask(client, str(api.model)) == greedy(api.model)
    oldest = list(client.fine_tuning.jobs.checkpoints.list(tuned_job["job_id"]))[-1]
    assert ask(client, oldest.id) == greedy(directories[0] / "merged")  # a third model: the first one goes
    assert ask(client, tuned) == expected
    assert len(replicas(api)) == 1
    (replica,) = replicas(api)
    assert replica.nice() == 19
    assert api.job(holding)["status"] == "running"

    with pytest.raises(openai.BadRequestError, match="context is 512 tokens"):
        client.chat.completions.create(model=tuned, messages=[{"role": "user", "content": "word " * 900}])
    with pytest.raises(openai.NotFoundError):
        ask(client, "gpt-4o")
    api.cancel(holding)
    api.until_status(holding, "cancelled")


def test_a_checkpoint_is_downloaded_bit_for_bit(
    api: Api, client: openai.OpenAI, tuned_job: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = client.fine_tuning.jobs.checkpoints.list(tuned_job["job_id"]).data[0]
    for variant in ("merged", "adapter"):
        route = f"/v1/fine_tuning/checkpoints/{checkpoint.id}/content"
        answer = api.http.get(route, params={"variant": variant})
        assert answer.headers["content-type"] == "application/x-tar"
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            tar.extractall(tmp_path / variant, filter="data")
        (unpacked,) = (tmp_path / variant).iterdir()
        kept = Path(tuned_job["checkpoints"][-1].removeprefix("file://")) / variant
        assert {path.name: path.read_bytes() for path in unpacked.iterdir()} == {
            path.name: path.read_bytes() for path in kept.iterdir()
        }
    assert json.loads((tmp_path / "adapter" / unpacked.name / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_client_that_goes_away_stops_its_answer_and_an_idle_model_goes(
    api: Api, client: openai.OpenAI, inputs: Path
) -> None:
    """Were the answer still made, the replica would not be idle: it has no end."""
    endless = str(make_tiny_model(inputs / "endless", max_position_embeddings=1 << 20))
    with client.chat.completions.create(model=endless, messages=ASKED, temperature=0, stream=True) as stream:
        chunks = iter(stream)
        for _ in range(20):
            next(chunks)
        assert replicas(api)
    eventually(lambda: not replicas(api), WAIT_S, lambda: "the idle replica stays")
    assert ask(client, str(api.model)) == greedy(api.model)  # and comes again

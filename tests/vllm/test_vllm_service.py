"""The service with vLLM behind /v1/chat/completions, on real Ray Serve. Run by `make test-vllm`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from tests.asking import ASKED, MAX_TOKENS, ask, client_of, streamed
from tests.generated import generated
from tests.service.conftest import Api, local_service, make_inputs
from tests.tiny_models import make_tiny_model
from tests.waiting import eventually

WAIT_S = 180.0


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"), 24, "It is {0}.")
    model = make_tiny_model(inputs / "wide", hidden_size=128)  # as vLLM on CPUs wants it
    storage = tmp_path_factory.mktemp("storage")
    with local_service(storage, inputs, TUNEWRIGHT_CHAT_ENGINE="vllm", TUNEWRIGHT_CHAT_MODELS="1") as service:
        yield Api(service, model, inputs / "rows.jsonl")


@pytest.fixture(scope="module")
def client(api: Api) -> openai.OpenAI:
    return client_of(api.service.url)


def of_vllm(api: Api) -> list[psutil.Process]:
    return api.processes("VLLM::")


def test_a_base_model_and_a_tuned_one_answer_take_turns_survive_a_kill_and_go_when_idle(
    api: Api, client: openai.OpenAI
) -> None:
    base, expected = str(api.model), generated(api.model, ASKED, MAX_TOKENS)[1]
    assert ask(client, base) == streamed(client, base) == expected
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: ask(client, base), range(8))) == {expected}
    eventually(lambda: of_vllm(api), 10, lambda: f"none of vLLM's among {[p.name() for p in psutil.process_iter()]}")

    job = api.until_status(api.submit(api.config(fine_tuning_options={"n_epochs": 2, "lr": 0.01})), "success")
    tuned = client.fine_tuning.jobs.retrieve(job["job_id"]).fine_tuned_model
    assert tuned is not None
    merged = Path(job["checkpoints"][-1].removeprefix("file://")) / "merged"
    assert streamed(client, tuned) == generated(merged, ASKED, MAX_TOKENS)[1] != expected
    assert ask(client, base) == expected  # it had to make room, and comes again

    before = {process.pid for process in of_vllm(api)}
    for replica in api.processes("ServeReplica", "chat"):
        replica.kill()
    eventually(lambda: not before & {one.pid for one in of_vllm(api)}, WAIT_S, lambda: f"left behind: {of_vllm(api)}")
    assert ask(client, base) == expected
    for process in of_vllm(api):
        process.kill()
    eventually(lambda: _answers(client, base, expected), WAIT_S, lambda: "a dead engine is not replaced")

    eventually(lambda: not api.processes("ServeReplica", "chat"), WAIT_S, lambda: "the idle replica stays")
    eventually(lambda: not of_vllm(api), WAIT_S, lambda: f"left behind: {of_vllm(api)}")


def _answers(client: openai.OpenAI, model: str, expected: str) -> bool:
    try:
        return ask(client, model) == expected
    except openai.InternalServerError:
        return False

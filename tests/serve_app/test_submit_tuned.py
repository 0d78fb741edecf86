"""POST /fine_tuning/jobs/submit with a tuned model or a checkpoint as the model."""

import shutil
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from events.facts import JobSucceeded
from tests.serve_app.live_server import MODEL, Server
from tests.tiny_models import make_tiny_model

SUBMIT = "/fine_tuning/jobs/submit"


class Trained:
    """A job that has succeeded, with a whole model at step 10 and an adapter's at step 20."""

    def __init__(self, server: Server, job_id: str) -> None:
        self.server, self.job_id = server, job_id
        self.directories = server.train(job_id, 10, 20)
        make_tiny_model(self.directories[10])
        make_tiny_model(self.directories[20] / "merged")
        server.append(job_id, JobSucceeded())
        v1 = f"{server.url}/v1/fine_tuning/jobs/{job_id}"
        self.name: str = httpx.get(v1).json()["fine_tuned_model"]
        last, first = httpx.get(f"{v1}/checkpoints").json()["data"]
        self.names = {
            self.name: (20, "merged"),
            last["id"]: (20, "merged"),
            last["fine_tuned_model_checkpoint"]: (20, "merged"),
            first["fine_tuned_model_checkpoint"]: (10, "."),
        }


@pytest.fixture
def trained(server: Server, submit: Callable[..., str]) -> Trained:
    return Trained(server, submit())


def test_a_job_starts_from_a_tuned_model_or_a_checkpoint_by_its_name(
    http: httpx.Client, trained: Trained, config: dict[str, Any]
) -> None:
    for name, (step, directory) in trained.names.items():
        answer = http.post(SUBMIT, json=config | {"model": name})
        assert answer.status_code == 200, answer.text
        job = answer.json()
        assert job["input_config"] == config | {"model": str(trained.directories[step] / directory)}
        assert job["resubmitted_from"] == {
            "job_id": trained.job_id,
            "checkpoint": trained.directories[step].as_uri(),
            "base_model": MODEL,
            "model": name,
        }
        assert http.get("/fine_tuning/jobs/status", params={"job_id": job["job_id"]}).json() == job
        assert http.get(f"/v1/fine_tuning/jobs/{job['job_id']}").json()["model"] == name


def test_a_retry_with_the_key_gets_its_job_also_when_the_checkpoint_is_gone(
    http: httpx.Client, trained: Trained, config: dict[str, Any]
) -> None:
    for name in trained.names:
        headers = {"Idempotency-Key": f"from {name}"}
        first = http.post(SUBMIT, json=config | {"model": name}, headers=headers)
        assert first.status_code == 200, first.text
    for directory in trained.directories.values():
        shutil.rmtree(directory)
    assert http.post(SUBMIT, json=config | {"model": trained.name}).json()["error"]["code"] == "checkpoint_deleted"
    for name in trained.names:
        headers = {"Idempotency-Key": f"from {name}"}
        again = http.post(SUBMIT, json=config | {"model": name}, headers=headers)
        assert again.status_code == 200, again.text
        assert again.json()["resubmitted_from"]["model"] == name


def test_a_key_used_with_one_name_is_refused_with_another(
    http: httpx.Client, trained: Trained, config: dict[str, Any]
) -> None:
    """Even where both stand for the same checkpoint."""
    headers = {"Idempotency-Key": f"names of {trained.job_id}"}
    assert http.post(SUBMIT, json=config | {"model": trained.name}, headers=headers).status_code == 200
    directory = str(trained.directories[20] / "merged")
    others = [*(name for name in trained.names if name != trained.name), directory, MODEL]
    for body in [*({"model": name} for name in others), {"model": trained.name, "metadata": {"other": True}}]:
        answer = http.post(SUBMIT, json=config | body, headers=headers)
        assert answer.json()["error"]["code"] == "idempotency_key_reused"


def test_an_identical_request_whose_answer_was_not_delivered_gets_the_same_job(
    http: httpx.Client, trained: Trained, config: dict[str, Any]
) -> None:
    asked = config | {"model": trained.name}
    first = http.post(SUBMIT, json=asked).json()
    assert http.post(SUBMIT, json=asked, headers={"x-stainless-retry-count": "1"}).json() == first
    assert http.post(SUBMIT, json=asked).json()["job_id"] != first["job_id"]


def test_a_name_that_stands_for_no_model_is_told(
    http: httpx.Client, trained: Trained, submit: Callable[..., str], config: dict[str, Any]
) -> None:
    unfinished = submit()
    refused = {
        "ft:x:tunewright::01ARZ3NDEKTSV4RRFFQ69G5FAV": (404, "model_not_found"),
        f"{trained.name}:ckpt-step-11": (404, "model_not_found"),
        trained.name.replace(trained.job_id.removeprefix("ftjob-"), unfinished.removeprefix("ftjob-")): (
            409,
            "job_not_succeeded",
        ),
        "ft:x": (422, "invalid_value"),
    }
    for name, (status, code) in refused.items():
        answer = http.post(SUBMIT, json=config | {"model": name})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, "model"), answer.text

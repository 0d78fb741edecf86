"""POST /fine_tuning/jobs/submit with requests that are good, or good but one too many."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from events.config import Config
from events.facts import Defaults, JobSubmitted
from tests.serve_app.live_server import Serve, Server
from trainers.planning.plan import make_plan, plan_of

SUBMIT = "/fine_tuning/jobs/submit"


def test_a_submit_answers_with_the_job_in_validation(http: httpx.Client, config: dict[str, Any]) -> None:
    answer = http.post(SUBMIT, json=config)
    assert answer.status_code == 200
    job = answer.json()
    assert job["job_id"].startswith("ftjob-")
    assert job["status"] == "validation"
    assert job["resources"]["workers"] == 1


def test_the_config_is_echoed_exactly_as_sent(http: httpx.Client, config: dict[str, Any]) -> None:
    sent = config | {
        "fine_tuning_options": {
            "n_epochs": 2,
            "lr": 1e-4,
            "custom_training_options": {"finetuning_type": "LoraFineTuneOptions"},
        },
        "logger": {"filename": "loss.jsonl"},
        "overrides": "--nproc_per_node 2",
        "metadata": {"ticket": 7, "nothing": None},
    }
    job = http.post(SUBMIT, json=sent).json()
    assert job["input_config"] == sent
    assert job["metadata"] == sent["metadata"]
    assert job["resources"]["workers"] == 2


def test_a_field_that_is_null_counts_as_left_out(http: httpx.Client, config: dict[str, Any]) -> None:
    answer = http.post(SUBMIT, json=config | {"validation_data": None, "fine_tuning_options": {"n_epochs": None}})
    assert answer.status_code == 200, answer.text
    assert answer.json()["input_config"] == config | {"fine_tuning_options": {}}


def test_no_field_of_a_job_is_null(http: httpx.Client, config: dict[str, Any]) -> None:
    job = http.post(SUBMIT, json=config).json()
    assert None not in job.values()


def test_a_retry_with_the_same_idempotency_key_returns_the_same_job(http: httpx.Client, config: dict[str, Any]) -> None:
    answers = [http.post(SUBMIT, json=config, headers={"Idempotency-Key": "order 66"}) for _ in range(2)]
    assert answers[0].json() == answers[1].json()


def test_retries_at_the_same_moment_make_one_job(http: httpx.Client, config: dict[str, Any]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: http.post(SUBMIT, json=config, headers={"Idempotency-Key": "rush"}), range(16))
        )
    assert len({answer.json()["job_id"] for answer in answers}) == 1


def test_an_idempotency_key_used_for_another_request_is_refused(http: httpx.Client, config: dict[str, Any]) -> None:
    http.post(SUBMIT, json=config, headers={"Idempotency-Key": "taken"})
    answer = http.post(SUBMIT, json=config | {"metadata": {"other": True}}, headers={"Idempotency-Key": "taken"})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "idempotency_key_reused"


@pytest.mark.parametrize("key", ["", "k" * 256, "tab\there", "\xe9"])
def test_an_idempotency_key_is_1_to_255_printable_characters(
    http: httpx.Client, config: dict[str, Any], key: str
) -> None:
    answer = http.post(SUBMIT, json=config, headers={b"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "Idempotency-Key"


def test_one_job_too_many_gets_429_and_is_told_when_to_come_back(serve: Serve) -> None:
    server = serve(max_live_jobs=1)
    server.submit()
    answer = httpx.post(server.url + SUBMIT, json=server.config())
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) > 0


def test_a_submitted_job_is_on_disk(server: Server, submit: Callable[..., str]) -> None:
    job_id = submit()
    (recorded,) = server.do(server.parts.log.read(job_id))
    assert isinstance(recorded.event, JobSubmitted)
    assert recorded.event.submission_id == job_id


def test_what_a_request_leaves_open_is_on_disk_as_well(
    server: Server, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that chooses something else goes on with the job as it began."""
    job_id = submit(fine_tuning_options={"extras": {"lr": 1e-3}})
    monkeypatch.setattr("trainers.planning.plan.DEFAULT_ROWS", 16)
    job = server.do(server.parts.log.job(job_id))
    assert job.defaults == Defaults(batch_size=8, lr=1e-3)
    assert (plan_of(job).batch_size, plan_of(job).lr) == (8, 1e-3)
    assert make_plan(Config.model_validate(job.input_config)).batch_size == 16

"""POST /fine_tuning/jobs/pause and /resume."""

from collections.abc import Callable

import httpx
import pytest

from events.facts import CancelRequested, JobPaused
from tests.events.facts_of_a_job import WORKER_DIED
from tests.serve_app.live_server import Server

STATUS = "/fine_tuning/jobs/status"
PAUSE = "/fine_tuning/jobs/pause"
RESUME = "/fine_tuning/jobs/resume"
CANCEL = "/fine_tuning/jobs/cancel"
Submit = Callable[..., str]


def kinds(server: Server, job_id: str) -> list[str]:
    return [recorded.event.type for recorded in server.do(server.parts.log.read(job_id))]


def test_a_pause_is_recorded_and_answers_with_the_job(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    answer = http.post(PAUSE, json={"job_id": job_id})
    assert answer.status_code == 200
    job = answer.json()
    assert (job["pause_requested"], job["why"]) == (True, "pausing")
    server.append(job_id, JobPaused(attempt=0))
    job = http.get(STATUS, params={"job_id": job_id}).json()
    assert (job["status"], job["why"]) == ("queued", "paused, until it is resumed")


def test_pausing_twice_is_pausing_once_and_so_is_resuming(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    for route in (PAUSE, PAUSE, RESUME, RESUME):
        assert http.post(route, json={"job_id": job_id}).status_code == 200
    assert kinds(server, job_id) == ["JobSubmitted", "PauseRequested", "JobResumed"]


def test_a_job_may_be_paused_again_after_it_was_resumed(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    for route in (PAUSE, RESUME, PAUSE):
        job = http.post(route, json={"job_id": job_id}).json()
    assert job["pause_requested"]


def test_a_paused_job_can_be_cancelled_and_then_not_resumed(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    http.post(PAUSE, json={"job_id": job_id})
    server.append(job_id, JobPaused(attempt=0))
    assert http.post(CANCEL, json={"job_id": job_id}).json()["cancel_requested"]
    for route in (PAUSE, RESUME):
        answer = http.post(route, json={"job_id": job_id})
        assert answer.status_code == 409
        assert answer.json()["error"]["type"] == "conflict_error"


@pytest.mark.parametrize("route", [PAUSE, RESUME])
def test_what_is_over_stays_over(http: httpx.Client, server: Server, submit: Submit, route: str) -> None:
    job_id = submit()
    server.append(job_id, WORKER_DIED)
    answer = http.post(route, json={"job_id": job_id})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "job_is_over"


@pytest.mark.parametrize("route", [PAUSE, RESUME])
def test_a_job_nobody_knows_is_a_404_and_a_request_without_one_a_422(http: httpx.Client, route: str) -> None:
    assert http.post(route, json={"job_id": "ftjob-none"}).status_code == 404
    answer = http.post(route, json={"jobid": "x"})
    assert answer.status_code == 422
    assert {problem["message"] for problem in answer.json()["error"]["errors"]} == {
        "is required",
        "unknown field; did you mean job_id?",
    }


def test_a_cancel_that_is_under_way_can_not_be_paused(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    server.append(job_id, CancelRequested())
    answer = http.post(PAUSE, json={"job_id": job_id})
    assert answer.status_code == 409
    error = answer.json()["error"]
    assert error["code"] == "cancelling"
    assert error["message"] == f"job {job_id} is being cancelled; it can be neither paused nor resumed"

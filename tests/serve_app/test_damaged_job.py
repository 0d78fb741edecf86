"""A job whose history can't be read as it was written, over HTTP."""

from typing import Any

import httpx
import pytest

from events.facts import JobSucceeded, MetricsRecorded, StepMetrics
from events.sqlite import SqliteStore
from tests.events.facts_of_a_job import BEGUN
from tests.serve_app.live_server import Serve, Server


@pytest.fixture
def damaged(serve: Serve) -> tuple[Server, str, str]:
    """A server, its job whose first event is not what was written, and a whole one."""
    server = serve()
    config = {"model": "smollm2-135m-instruct", "data": str(server.parts.settings.storage / "rows.jsonl")}
    ids = [httpx.post(f"{server.url}/fine_tuning/jobs/submit", json=config).json()["job_id"] for _ in range(2)]
    spoil(server, ids[0])
    return server, ids[0], ids[1]


def spoil(server: Server, job_id: str) -> None:
    """Changes the job's events on disk."""
    log = server.parts.log
    store = log._store
    assert isinstance(store, SqliteStore)

    def spoil() -> None:
        with store._db:
            store._db.execute("UPDATE events SET time = '2026-01-01T00:00:00+00:00' WHERE job_id = ?", (job_id,))

    log._thread.submit(spoil).result()


def test_a_damaged_job_is_a_503_that_is_not_tried_again_and_the_others_are_served(
    damaged: tuple[Server, str, str],
) -> None:
    server, spoilt, whole = damaged

    def refused(answer: httpx.Response) -> dict[str, Any]:
        assert answer.status_code == 503, answer.text
        assert "retry-after" not in answer.headers
        assert answer.headers["x-should-retry"] == "false"
        error: dict[str, Any] = answer.json()["error"]
        assert (error["type"], error["code"]) == ("service_unavailable_error", "job_damaged")
        assert "operator has to restore it" in error["message"]
        return error

    with httpx.Client(base_url=server.url, timeout=30) as http:
        refused(http.get(f"/v1/fine_tuning/jobs/{spoilt}/events"))  # reading it finds the damage
        for path in (
            f"/fine_tuning/jobs/status?job_id={spoilt}",
            f"/fine_tuning/jobs/tail?job_id={spoilt}",
            f"/v1/fine_tuning/jobs/{spoilt}",
            f"/v1/files/file-results-{spoilt}",
        ):
            assert refused(http.get(path))["param"] == "job_id"
        for action in ("cancel", "pause", "resume", "resubmit"):
            refused(http.post(f"/fine_tuning/jobs/{action}", json={"job_id": spoilt}))
        listed = http.get("/fine_tuning/jobs").json()["data"]
        assert [job["job_id"] for job in listed] == [whole]
        assert http.post("/fine_tuning/jobs/cancel", json={"job_id": whole}).status_code == 200


def test_a_job_whose_damage_is_found_when_files_are_listed_hides_no_other_file(serve: Serve) -> None:
    server = serve()
    whole, spoilt = server.submit(), server.submit()
    metrics = MetricsRecorded(attempt=1, steps=[StepMetrics(step=1, epoch=1, time="2026-01-01T00:00:00Z", loss=1.0)])
    for job_id in (whole, spoilt):
        server.append(job_id, *BEGUN, metrics, JobSucceeded())
    spoil(server, spoilt)
    answer = httpx.get(f"{server.url}/v1/files", params={"limit": 1})
    assert answer.status_code == 200, answer.text
    listed = answer.json()
    assert [file["id"] for file in listed["data"]] == [f"file-results-{whole}"]
    assert not listed["has_more"]

"""A submit that is sent again because its answer was lost makes no second job."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from tests.faults.killing import RECOVERY_S, Faults
from tests.waiting import eventually

TIMES_EACH = 3


@pytest.mark.timeout(3600)
def test_every_submit_makes_one_job_however_often_it_is_sent_while_replicas_are_killed(
    faults: Faults, long: bool, seed: int
) -> None:
    submits = 1000 if long else 60
    rng = random.Random(seed)  # noqa: S311  -- the order of requests
    sends = [number for number in range(submits) for _ in range(TIMES_EACH)]
    rng.shuffle(sends)
    before = set(_all_jobs(faults))
    done = threading.Event()
    killer = threading.Thread(target=_kill_replicas, args=(faults, done))
    killer.start()
    try:
        with ThreadPoolExecutor(8) as senders:
            answers = list(senders.map(lambda number: (number, _submit(faults, f"{seed}-{number}")), sends))
    finally:
        done.set()
        killer.join()
    made: dict[int, set[str]] = {}
    for number, job_id in answers:
        made.setdefault(number, set()).add(job_id)
    assert all(len(job_ids) == 1 for job_ids in made.values())
    new = set(_all_jobs(faults)) - before
    assert new == set().union(*made.values())
    assert len(new) == submits
    for job_id in new:
        faults.until(job_id, lambda job: _cancelled(faults, job["job_id"]))
    for job_id in new:
        faults.until(job_id, lambda job: job["status"] in ("cancelled", "success"))


def _submit(faults: Faults, key: str) -> str:
    """Sends a submit until it is answered, as a client would."""

    def answered() -> str | None:
        with suppress(httpx.HTTPError):
            answer = faults.api.http.post(
                "/fine_tuning/jobs/submit", json=faults.api.config(), headers={"Idempotency-Key": key}
            )
            if answer.status_code == 200:
                return str(answer.json()["job_id"])
            assert answer.status_code >= 500, answer.text
        return None

    return eventually(answered, RECOVERY_S, lambda: f"no answer to {key}")


def _kill_replicas(faults: Faults, done: threading.Event) -> None:
    """Until `done`, kills each replica as soon as it works; kills at least one."""
    while True:
        faults.kill("Serve replica", "")
        faults.until_up()
        if done.wait(1):
            return


def _all_jobs(faults: Faults) -> list[str]:
    ids: list[str] = []
    while True:
        after = {"after": ids[-1]} if ids else {}
        page = faults.api.http.get("/fine_tuning/jobs", params={"limit": 100, **after}).json()
        ids += [job["job_id"] for job in page["data"]]
        if not page["has_more"]:
            return ids


def _cancelled(faults: Faults, job_id: str) -> bool:
    """Asks to cancel the job. True if the API accepted that, or if the job has ended meanwhile."""
    answer = faults.api.http.post("/fine_tuning/jobs/cancel", json={"job_id": job_id})
    return answer.status_code in (200, 409)

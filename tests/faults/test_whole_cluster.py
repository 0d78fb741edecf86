"""The whole cluster is lost while a job trains; and jobs that need all of it, one after the other."""

import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from events.facts import MetricsRecorded, RunInterrupted, RunStarted
from events.sqlite import SqliteStore
from tests.faults.killing import INTERVAL, Faults, a_service, logged, step_of
from tests.service.conftest import CPUS, Api, title
from tests.waiting import eventually

TIMES = 20
"""How often the long suite kills the whole cluster."""


@pytest.mark.timeout(6 * 3600)
def test_after_the_whole_cluster_is_killed_nothing_is_lost_and_a_running_job_goes_on(
    tmp_path: Path, inputs: Path, long: bool
) -> None:
    storage = tmp_path / "storage"
    with a_service(storage, inputs) as service:
        faults = Faults(Api(service, inputs / "tiny", inputs / "rows.jsonl"))
        done = faults.submit()
        finished = faults.until(done, lambda job: job["status"] == "success")
        lines = faults.api.messages(done)
        running = _killed_while_it_trains(faults)
    for round_ in range(TIMES if long else 1):
        with a_service(storage, inputs) as service:
            faults = Faults(Api(service, inputs / "tiny", inputs / "rows.jsonl"))
            assert faults.api.job(done) == finished
            assert faults.api.messages(done) == lines
            job = faults.until(running, lambda job: job["status"] not in ("validation", "queued", "running"))
            assert (job["status"], job["attempt"]) == ("success", 2), job
            assert logged(job) == logged(finished)
            if round_ < TIMES - 1 and long:
                running = _killed_while_it_trains(faults, "raylet" if round_ % 2 else "")
    assert losses_on_record(storage, running) == losses_on_record(storage, done)


def _killed_while_it_trains(faults: Faults, word: str = "") -> str:
    """Starts a job. Once it trains, kills all processes of the cluster, or only those with `word` in their titles,
    without which the others end, too. Returns the job's id."""
    job_id = faults.submit()
    faults.until(
        job_id, lambda job: job["status"] == "running" and bool(job["checkpoints"]) and step_of(job) > INTERVAL
    )
    for process in faults.api.processes(word):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    return job_id


def losses_on_record(storage: Path, job_id: str) -> dict[int, float | None]:
    """The loss of each step in the job's events; of steps that were repeated after an interruption, the last one. Fails
    unless each step of an attempt follows the one before it."""
    store = SqliteStore(storage / "events.db")
    losses: dict[int, float | None] = {}
    last: int | None = None
    for recorded in iter_events(store, job_id):
        match recorded:
            case RunStarted() | RunInterrupted():
                last = None
            case MetricsRecorded():
                for metrics in recorded.steps:
                    if last is None:
                        losses = {step: loss for step, loss in losses.items() if step < metrics.step}
                        last = len(losses)
                    assert metrics.step == last + 1
                    last = metrics.step
                    losses[last] = metrics.loss
    store.close()
    return losses


def iter_events(store: SqliteStore, job_id: str) -> list[Any]:
    version, events = -1, []
    while page := store.read_stream(job_id, version):
        events += [recorded.event for recorded in page]
        version = page[-1].version
    return events


@pytest.mark.timeout(6 * 3600)
def test_two_jobs_that_each_need_the_whole_cluster_leave_nothing_behind_however_they_are_cancelled(
    faults: Faults, long: bool, seed: int
) -> None:
    rng = random.Random(seed)  # noqa: S311  -- moments to cancel at
    whole = f"--nproc_per_node {CPUS} --max-restarts 1000"
    jobs: list[str] = []
    for _ in range(100 if long else 2):
        pair = [faults.submit(overrides=whole) for _ in range(2)]
        jobs += pair
        time.sleep(rng.uniform(0, 15))  # in any state: validating, waiting, being placed, training
        rng.shuffle(pair)
        for job_id in pair:
            faults.api.cancel(job_id)
            if rng.random() < 0.5:
                faults.api.until_status(job_id, "cancelled")
        for job_id in pair:
            faults.api.until_status(job_id, "cancelled")
    assert _groups(faults) == []
    orphans = [title(process) for process in faults.api.service.processes()]
    assert [words for words in orphans if any(job_id in words for job_id in jobs)] == []
    last = faults.submit(overrides=whole)  # it gets all resources that they held
    faults.until(last, lambda job: job["status"] == "running")
    faults.api.cancel(last)
    faults.api.until_status(last, "cancelled")
    eventually(lambda: _groups(faults) == [], 30, lambda: f"placement groups are left: {_groups(faults)}")


def _groups(faults: Faults) -> list[str]:
    """The names of the placement groups that Ray has not removed."""
    url = faults.api.service.dashboard_url + "/api/v0/placement_groups?detail=1"
    groups = httpx.get(url, timeout=30, trust_env=False).json()["data"]["result"]["result"]
    return [group["name"] for group in groups if group["state"] != "REMOVED"]

"""A runner that was replaced and has not noticed it changes nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from events.facts import Event, RunInterrupted
from events.ids import new_event_id
from events.job import FineTuningJob
from events.log import EventLog
from tests.events.facts_of_a_job import ADMITTED, CANCEL, FAILED, PAUSE, measured, paused, started, step
from tests.trainers.job_on_a_log import JOB, JobOnALog
from trainers.running.tenure import Cancelled, Superseded, Tenure


@pytest.fixture
def scene() -> JobOnALog:
    return JobOnALog()


@pytest.mark.parametrize(
    "late", [started(1), FAILED, RunInterrupted(attempt=0, reason="r")], ids=lambda event: event.type
)
def test_a_runner_that_was_lost_before_its_run_began_cannot_begin_fail_or_interrupt_the_next_one_s(
    scene: JobOnALog, late: Event
) -> None:
    old = scene.runner()
    scene.tell(RunInterrupted(attempt=0, reason="its runner ended"), ADMITTED)
    new = scene.runner()
    before = scene.job
    with pytest.raises(Superseded):
        old.append(late)
    assert scene.job == before
    assert new.append(started(1)).status == "running"


def test_a_runner_whose_run_was_replaced_cannot_interrupt_the_newer_run(scene: JobOnALog) -> None:
    old = scene.runner()
    old.append(started(1))
    scene.tell(RunInterrupted(attempt=1, reason="its runner ended"), ADMITTED)
    new = scene.runner()
    new.append(started(2))
    for late in (RunInterrupted(attempt=2, reason="a worker died"), FAILED):
        with pytest.raises(Superseded):
            old.append(late)
    assert (scene.job.status, scene.job.attempt) == ("running", 2)


def test_a_runner_that_records_an_interruption_itself_goes_on(scene: JobOnALog) -> None:
    runner = scene.runner()
    runner.append(started(1))
    runner.append(RunInterrupted(attempt=1, reason="a worker died"))
    scene.tell(ADMITTED)
    assert runner.append(started(2)).attempt == 2


def test_no_runner_can_change_a_job_that_is_over(scene: JobOnALog) -> None:
    runner = scene.runner()
    scene.tell(FAILED)
    with pytest.raises(Superseded):
        runner.append(started(1))


@pytest.mark.parametrize(
    ("facts", "late"),
    [([CANCEL], RunInterrupted(attempt=0, reason="r")), ([CANCEL], FAILED), ([PAUSE, paused(0)], started(1))],
    ids=["cancelling, interrupted", "cancelling, failed", "paused, started"],
)
def test_the_runner_of_a_job_that_is_being_cancelled_or_is_paused_is_superseded(
    scene: JobOnALog, facts: list[Event], late: Event
) -> None:
    runner = scene.runner()
    scene.tell(*facts)
    before = scene.job
    with pytest.raises(Superseded, match=r"is (being cancelled|paused)$") as told:
        runner.append(late)
    assert isinstance(told.value, Cancelled) is (CANCEL in facts)
    assert scene.job == before


class Busy(EventLog):
    """Something else is recorded between every look at a job and the append that follows, as often as `meanwhile` has
    it."""

    def __init__(self, log: EventLog, meanwhile: list[Callable[[], Event]]) -> None:
        self.log = log
        self.meanwhile = meanwhile

    async def job(self, job_id: str) -> FineTuningJob:
        job = await self.log.job(job_id)
        if self.meanwhile:
            await self.log.append(job_id, [self.meanwhile.pop(0)()], [new_event_id()])
        return job

    async def append(
        self, job_id: str, events: list[Event], event_ids: list[str], expected_version: int | None = None
    ) -> FineTuningJob:
        return await self.log.append(job_id, events, event_ids, expected_version)


def test_events_that_are_recorded_meanwhile_are_checked_before_the_append(scene: JobOnALog) -> None:
    scene.tell(started(1))
    busy = Busy(scene.log, [lambda: RunInterrupted(attempt=1, reason="its runner ended")])
    with pytest.raises(Superseded):
        Tenure(busy, JOB, 0).append(FAILED)
    assert scene.job.status == "queued"
    scene.tell(ADMITTED, started(2))
    harmless: list[Callable[[], Event]] = [lambda: measured(2, step(1)), lambda: measured(2, step(2))]
    job = Tenure(Busy(scene.log, harmless), JOB, 1).append(RunInterrupted(attempt=2, reason="a worker died"))
    assert job.interruptions == 2


WATCHED = """
import threading
from tests.events.facts_of_a_job import started
from tests.trainers.job_on_a_log import JOB, JobOnALog
from events.facts import RunInterrupted
from trainers.running import tenure
tenure.WATCH_S = 0.1
scene = JobOnALog()
scene.tell(started(1))
looks = threading.Semaphore(0)
tenure.Watch(
    scene.log, JOB, 1, scene.runner(), lambda job: looks.release(), lambda reason: print(reason, flush=True)
)
for _ in range(3):
    looks.acquire()
print("still here", flush=True)
scene.tell(RunInterrupted(attempt=1, reason="r"))
threading.Event().wait(60)  # a collective call whose partner is gone
print("hung to the end", flush=True)
"""


def test_a_worker_that_hangs_ends_soon_after_it_was_replaced_and_not_before() -> None:
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", WATCHED], cwd=root, capture_output=True, text=True, timeout=120)
    assert ran.stdout == "still here\njob ftjob-1 is after interruption 1, another runner's\n", ran.stderr
    assert ran.returncode == 1

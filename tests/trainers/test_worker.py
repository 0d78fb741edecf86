"""How a worker learns from the log that its job is to pause, or is no longer its own."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from events.actors import EventLogClient
from events.facts import (
    DataValidated,
    Event,
    JobAdmitted,
    JobSubmitted,
    MetricsRecorded,
    PauseRequested,
    RunStarted,
    StepMetrics,
)
from events.ids import new_event_id
from events.log import EventLog
from events.memory import MemoryStore
from tests.events.facts_of_a_job import REPORT
from tests.trainers.test_runner import RESOURCES
from tests.waiting import WAIT_S, eventually
from trainers import tenure
from trainers.retrying import retrying
from trainers.tenure import Superseded, Tenure, Watch
from trainers.worker import Assignment, RayReporter

JOB = "ftjob-1"


class Running:
    """A job whose first attempt trains, as its log and its rank 0 see it."""

    def __init__(self) -> None:
        self.log = EventLog(MemoryStore())
        event = JobSubmitted(config={}, resources=RESOURCES, max_restarts=1, submission_id=JOB)
        retrying(lambda: self.log.submit(JOB, event, new_event_id(), 10))
        self.tell(DataValidated(data=REPORT), JobAdmitted(), self.started(1))
        places = dict.fromkeys(("storage", "job_dir", "model_dir"), "")
        assignment = Assignment(JOB, attempt=1, interruptions=0, plan={}, resume_from=None, **places)
        self.client: EventLogClient = self.log  # type: ignore[assignment]  # the same methods, without Ray between
        self.tenure = Tenure(self.log, JOB, 0)
        self.reporter = RayReporter(assignment, 0, self.client, self.tenure, lambda: None)

    def tell(self, *events: Event) -> None:
        retrying(lambda: self.log.append(JOB, list(events), [new_event_id() for _ in events]))

    def started(self, attempt: int) -> RunStarted:
        return RunStarted(attempt=attempt, workers=1, nodes=1, device="cpu", total_steps=9, logs="file:///m.jsonl")

    def step(self, number: int) -> None:
        self.reporter.metrics(StepMetrics(step=number, epoch=1, time=datetime.now(UTC).isoformat(), loss=1.0))


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.reporter.close()


def test_a_worker_whose_steps_are_short_learns_of_a_pause_as_it_reports_them(running: Running) -> None:
    running.step(1)
    running.tell(PauseRequested())
    running.step(2)
    eventually(running.reporter.should_stop, WAIT_S, lambda: "it goes on")


def test_a_worker_in_a_long_step_asks(monkeypatch: pytest.MonkeyPatch, running: Running) -> None:
    monkeypatch.setattr(tenure, "WATCH_S", 0.05)
    watch = Watch(running.client, JOB, 1, running.tenure, running.reporter.look)
    try:
        assert not running.reporter.should_stop()
        running.tell(PauseRequested(by="node_drain"))
        eventually(running.reporter.should_stop, WAIT_S, lambda: "it goes on")
        history = retrying(lambda: running.log.read(JOB))
        assert not any(isinstance(recorded.event, MetricsRecorded) for recorded in history)
    finally:
        watch.close()


def test_a_worker_that_was_replaced_is_told_when_it_reports(running: Running) -> None:
    running.tell(running.started(2))
    running.step(1)

    def superseded() -> bool:
        try:
            running.step(2)
        except Superseded:
            return True
        return False

    eventually(superseded, WAIT_S, lambda: "it is not told")
    assert not running.reporter.should_stop()

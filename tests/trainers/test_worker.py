"""How a worker learns from the log that its job is to pause, or is no longer its own."""

from collections.abc import Iterator

import pytest

from events.actors import EventLogClient
from events.facts import MetricsRecorded, PauseRequested
from tests.events.facts_of_a_job import started, step
from tests.trainers.job_on_a_log import JOB, JobOnALog
from tests.waiting import WAIT_S, eventually
from trainers import tenure
from trainers.retrying import retrying
from trainers.tenure import Superseded, Watch
from trainers.worker import Assignment, RayReporter


class Running(JobOnALog):
    """A job whose first attempt trains, as its log and its rank 0 see it."""

    def __init__(self) -> None:
        super().__init__()
        self.tell(started(1))
        places = dict.fromkeys(("storage", "job_dir", "model_dir"), "")
        assignment = Assignment(JOB, attempt=1, interruptions=0, plan={}, resume_from=None, **places)
        self.client: EventLogClient = self.log  # type: ignore[assignment]  # the same methods, without Ray between
        self.tenure = self.runner()
        self.reporter = RayReporter(assignment, 0, self.client, self.tenure, lambda: None)

    def step(self, number: int) -> None:
        self.reporter.metrics(step(number))


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.reporter.close()


def test_a_worker_whose_steps_are_short_learns_of_a_pause_as_it_reports_them(running: Running) -> None:
    running.step(1)
    assert not running.reporter.should_stop()
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
    running.tell(started(2))
    running.step(1)

    def superseded() -> bool:
        try:
            running.step(2)
        except Superseded:
            return True
        return False

    eventually(superseded, WAIT_S, lambda: "it is not told")
    assert not running.reporter.should_stop()

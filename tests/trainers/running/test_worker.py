"""How a worker learns from the log that its job is to pause or has another runner, and how its logger is closed."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train

from events.facts import MetricsRecorded, PauseRequested
from tests.events.facts_of_a_job import started, step
from tests.trainers.job_on_a_log import JOB, JobOnALog
from tests.trainers.recipe_support import make_plan_for
from tests.waiting import WAIT_S, eventually
from trainers.errors import InfrastructureError
from trainers.retrying import retrying
from trainers.running import tenure, worker
from trainers.running.tenure import Cancelled, Superseded, Watch
from trainers.running.worker import FINISHED, PAUSED, Assignment, RayReporter, train_worker
from trainers.training import recipe
from trainers.training.loggers import DiskLogger, End
from trainers.training.reporting import Stopped


class Running(JobOnALog):
    """A job whose first attempt trains, as its log and its rank 0 see it."""

    def __init__(self) -> None:
        super().__init__()
        self.tell(started(1))
        places = dict.fromkeys(("storage", "job_dir", "model_dir"), "")
        assignment = Assignment(JOB, attempt=1, interruptions=0, plan={}, resume_from=None, **places)
        self.tenure = self.runner()
        self.reporter = RayReporter(assignment, 0, self.log, self.tenure, lambda: None)

    def step(self, number: int) -> None:
        self.reporter.metrics(step(number))


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.reporter.close("finished")


def test_a_worker_whose_steps_are_short_learns_of_a_pause_as_it_reports_them(running: Running) -> None:
    running.step(1)
    assert not running.reporter.should_stop()
    running.tell(PauseRequested())
    running.step(2)
    eventually(running.reporter.should_stop, WAIT_S, lambda: "it goes on")


def test_a_worker_in_a_long_step_asks(monkeypatch: pytest.MonkeyPatch, running: Running) -> None:
    monkeypatch.setattr(tenure, "WATCH_S", 0.05)
    watch = Watch(running.log, JOB, 1, running.tenure, running.reporter.look, lambda _: None)
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


@pytest.fixture
def assignment(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Assignment:
    """Of rank 0 of the job, in this process, without Ray; its data is prepared."""
    nothing = SimpleNamespace(flush=lambda: None, close=lambda: None)
    rank = SimpleNamespace(get_world_rank=lambda: 0)
    monkeypatch.setattr(ray.train, "get_context", lambda: rank)
    monkeypatch.setattr(worker, "connect", lambda _: SimpleNamespace(log=running.log, lines=None))
    monkeypatch.setattr(worker, "OutputCapture", lambda *_, **__: nothing)
    monkeypatch.setattr(worker, "give_way", lambda: None)
    monkeypatch.setattr(worker, "log_to_stdout", lambda: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    (tmp_path / "data" / "train").mkdir(parents=True)
    plan = make_plan_for().model_dump(mode="json")
    places = {"storage": "", "job_dir": str(tmp_path), "model_dir": ""}
    return Assignment(JOB, attempt=1, interruptions=0, plan=plan, resume_from=None, **places)


def test_a_node_that_does_not_see_the_storage_is_named_and_the_model_is_not_blamed(
    assignment: Assignment, tmp_path: Path
) -> None:
    elsewhere = replace(assignment, job_dir=str(tmp_path / "not-mounted"))
    with pytest.raises(InfrastructureError, match=socket.gethostname()) as failed:
        train_worker(elsewhere.as_dict())
    assert failed.value.error.code == "storage_not_shared"
    assert not Path(elsewhere.job_dir).exists()  # where it is to be mounted, nothing is left


class Listening(DiskLogger):
    def __init__(self, path: Path) -> None:
        super().__init__(path, 0)
        self.heard: list[End] = []

    def close(self, end: End = "finished") -> None:
        self.heard.append(end)
        super().close(end)


def test_a_worker_that_is_about_to_be_killed_says_so_and_what_it_has_reported_is_in_the_log(
    running: Running, tmp_path: Path
) -> None:
    listening = Listening(tmp_path / "metrics.jsonl")
    running.reporter._logger = listening
    running.step(1)
    running.reporter.leave("cancelled")
    assert listening.heard == ["cancelled"]
    assert running.job.metrics is not None
    running.step(2)  # training goes on until it is killed
    running.reporter.close("failed")
    assert listening.heard == ["cancelled"]
    assert listening.uri.endswith("metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_worker_that_can_not_say_how_it_ends_is_not_waited_for(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LEAVE_S", 0.1)
    flushed = threading.Event()
    monkeypatch.setattr(running.reporter, "_flush_output", flushed.wait)
    running.reporter.leave("cancelled")
    assert "leave" in [thread.name for thread in threading.enumerate()]  # it still tries, and nobody waits
    flushed.set()


@pytest.mark.parametrize(
    ("end", "returns", "hears"),
    [
        (None, FINISHED, "finished"),
        (Stopped(3), PAUSED, "paused"),
        (ValueError("a bug"), None, "failed"),
        (Cancelled("it is being cancelled"), None, "cancelled"),
        (Superseded("it is another runner's"), None, "replaced"),
    ],
)
def test_the_logger_hears_how_the_run_ended(
    assignment: Assignment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: Exception | None,
    returns: str | None,
    hears: End,
) -> None:
    listening = Listening(tmp_path / "metrics.jsonl")

    def train(plan: object, *, reporter: RayReporter, **_: object) -> None:
        reporter._logger = listening
        if end is not None:
            raise end

    monkeypatch.setattr(recipe, "train", train)
    if returns is not None:
        assert train_worker(assignment.as_dict()) == returns
    else:
        assert end is not None
        with pytest.raises(type(end), match=str(end)):
            train_worker(assignment.as_dict())
    assert listening.heard == [hears]

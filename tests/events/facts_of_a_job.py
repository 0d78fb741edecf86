"""Example facts, and the history they make: what tests are given."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from events.codec import AnyEvent
from events.facts import (
    CancelRequested,
    CheckpointSaved,
    DataRejected,
    DataReport,
    DataValidated,
    JobAdmitted,
    JobCancelled,
    JobError,
    JobFailed,
    JobPaused,
    JobResumed,
    JobSubmitted,
    JobSucceeded,
    MetricsRecorded,
    PauseRequested,
    Resources,
    RunInterrupted,
    RunStarted,
    StepMetrics,
)
from events.job import FineTuningJob, fold
from events.store import Recorded

START = datetime(2026, 11, 22, 12, tzinfo=UTC)
CONFIG = {"model": "smol", "data": "file:///d.jsonl", "metadata": {"team": "a", "ticket": None}}
RESOURCES = Resources(workers=2, nodes=1, cpus_per_worker=1, gpus_per_worker=0)
REPORT = DataReport(
    uri="file:///d.jsonl",
    rows=10,
    invalid_rows=0,
    tokens=100,
    trained_tokens=40,
    truncated_rows=0,
    max_seq_len=512,
    length_histogram={"16": 10},
    errors=[],
)
ERROR = JobError(code="out_of_memory", message="CUDA out of memory", fault="user")

SUBMITTED = JobSubmitted(config=CONFIG, resources=RESOURCES, max_restarts=3, submission_id="ftjob-1")
VALIDATED = DataValidated(data=REPORT)
REJECTED = DataRejected(error=ERROR, error_path="file:///e.txt", data=REPORT)
ADMITTED = JobAdmitted()
PAUSE = PauseRequested()
DRAIN = PauseRequested(by="node_drain")
RESUME = JobResumed()
CANCEL = CancelRequested()
SUCCEEDED = JobSucceeded()
FAILED = JobFailed(error=ERROR, error_path="file:///e.txt")
WORKER_DIED = JobFailed(error=JobError(code="worker_died", message="a worker died", fault="infrastructure"))
CANCELLED = JobCancelled()


def started(attempt: int, *, total_steps: int = 100, n_epochs: int = 2, device: str = "cpu") -> RunStarted:
    return RunStarted(
        attempt=attempt,
        workers=2,
        nodes=1,
        device=device,
        total_steps=total_steps,
        n_epochs=n_epochs,
        logs="file:///m.jsonl",
    )


def step(number: int, *, epoch: int = 1, loss: float | None = 1.0, valid_loss: float | None = None) -> StepMetrics:
    return StepMetrics(step=number, epoch=epoch, time="2026-11-22T12:00:00Z", loss=loss, valid_loss=valid_loss)


def measured(attempt: int, *steps: StepMetrics) -> MetricsRecorded:
    return MetricsRecorded(attempt=attempt, steps=list(steps))


def saved(attempt: int, number: int, epoch: int = 0) -> CheckpointSaved:
    return CheckpointSaved(attempt=attempt, step=number, epoch=epoch, uri=f"file:///step-{number}")


def interrupted(attempt: int) -> RunInterrupted:
    return RunInterrupted(attempt=attempt, reason="a worker died")


def paused(attempt: int) -> JobPaused:
    return JobPaused(attempt=attempt)


QUEUED = (SUBMITTED, VALIDATED)
BEGUN = (VALIDATED, ADMITTED, started(1))
"""The events that make a submitted job a running one."""
RUNNING = (SUBMITTED, *BEGUN)


def history(events: Iterable[AnyEvent]) -> list[Recorded]:
    """The events as they would stand in the log, a second apart."""
    return [
        Recorded(number + 1, "ftjob-1", number, f"e{number}", START + timedelta(seconds=number), event)
        for number, event in enumerate(events)
    ]


def given(*events: AnyEvent) -> FineTuningJob:
    """The job these events make."""
    job = fold(history(events))
    assert job is not None
    return job

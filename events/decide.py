"""`decide`: the rules for which events may be added to a job's history."""

from events.facts import (
    CancelRequested,
    CheckpointSaved,
    CheckpointsDeleted,
    DataRejected,
    DataValidated,
    Event,
    JobAdmitted,
    JobCancelled,
    JobFailed,
    JobPaused,
    JobResumed,
    JobSubmitted,
    JobSucceeded,
    MetricsRecorded,
    PauseRequested,
    RunInterrupted,
    RunStarted,
)
from events.job import FineTuningJob


class Refused(Exception):
    """The fact can't be true of this job. `code` is a stable word for programs:

    - `unknown_job`: no such job.
    - `job_exists`: a second JobSubmitted.
    - `job_is_over`: the job has another outcome already.
    - `cancelling`: cancellation was asked for; only measurements, checkpoints and JobCancelled may follow.
    - `not_cancelling`: JobCancelled without a CancelRequested.
    - `stale_attempt`: the run that reports was replaced or interrupted.
    - `out_of_order`: not in this status.

    and from `EventLog`: `idempotency_key_reused`, `too_many_jobs`, `invalid_event`, `unknown_after` (there is no job
    with the id that a page of the list is to begin after), and `job_damaged`: events of the job can't be read, so it is
    neither shown nor changed.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type["Refused"], tuple[str, str]]:
        return type(self), (self.code, self.message)


def decide(job: FineTuningJob | None, event: Event) -> list[Event]:
    """What to append when `event` is proposed: `[event]`, or `[]` if it would change nothing.

    Raises Refused.
    """
    if job is None:
        if isinstance(event, JobSubmitted):
            return [event]
        raise Refused("unknown_job", "no such job")
    if isinstance(event, JobSubmitted):
        raise Refused("job_exists", f"job {job.job_id} exists already")
    if job.over:
        return _after_the_end(job, event)
    if job.cancel_requested:
        return _while_cancelling(job, event)
    if job.paused:
        return _while_paused(job, event)
    return _while_alive(job, event)


def _after_the_end(job: FineTuningJob, event: Event) -> list[Event]:
    match event:
        case JobSucceeded():
            same = job.status == "success"
        case JobCancelled() | CancelRequested():
            same = job.status == "cancelled"
        case JobFailed() | DataRejected():
            same = job.status == "failed" and job.error == event.error
        case _:
            same = False
    if same:
        return []
    ended = {"success": "has succeeded", "failed": "has failed"}.get(job.status, "was cancelled")
    raise Refused("job_is_over", f"job {job.job_id} {ended}")


def _while_cancelling(job: FineTuningJob, event: Event) -> list[Event]:
    match event:
        case CancelRequested():
            return []
        case JobCancelled():
            return [event]
        case MetricsRecorded() | CheckpointSaved() | CheckpointsDeleted():
            return _while_alive(job, event)
        case _:
            raise Refused("cancelling", f"job {job.job_id} is being cancelled")


def _while_paused(job: FineTuningJob, event: Event) -> list[Event]:
    """No process of the job runs, so nothing else can happen to it."""
    match event:
        case PauseRequested() | JobPaused():
            return []
        case JobResumed() | CancelRequested():
            return [event]
        case JobCancelled():
            return _while_alive(job, event)
        case _:
            raise Refused("out_of_order", f"job {job.job_id}: {event.type} while it is paused")


def _while_alive(job: FineTuningJob, event: Event) -> list[Event]:
    match event:
        case DataValidated():
            return _data_validated(job, event)
        case DataRejected():
            return _require(job, event, job.status == "validation")
        case JobAdmitted():
            return [] if job.admitted else _require(job, event, job.status == "queued" and not job.pausing)
        case RunStarted():
            return _run_started(job, event)
        case MetricsRecorded() | CheckpointSaved() | CheckpointsDeleted():
            _check_attempt(job, event, event.attempt)
            _require(job, event, job.status == "running")
            return [] if isinstance(event, CheckpointSaved) and event.uri in job.checkpoints else [event]
        case RunInterrupted():
            # The lost runner may only have waited. A loss that is reported again has the same event id.
            _check_attempt(job, event, event.attempt)
            return [event]
        case PauseRequested():
            known = job.pause_requested if event.by == "user" else job.pausing
            return [] if known else [event]
        case JobPaused():
            return _job_paused(job, event)
        case JobResumed():
            return [event] if job.pause_requested else []
        case JobSucceeded() | JobFailed():
            if event.attempt is not None:
                _check_attempt(job, event, event.attempt)
            return _require(job, event, isinstance(event, JobFailed) or job.status == "running")
        case JobCancelled():
            raise Refused("not_cancelling", f"job {job.job_id} was not asked to cancel")
        case _:  # CancelRequested
            return [event]


def _data_validated(job: FineTuningJob, event: DataValidated) -> list[Event]:
    """A runner that was started again validates again. The same result adds nothing."""
    if job.validated and (job.data, job.validation_data) == (event.data, event.validation_data):
        return []
    return _require(job, event, job.status == "validation")


def _run_started(job: FineTuningJob, event: RunStarted) -> list[Event]:
    """The next attempt may start while one runs: Ray Train has then replaced the workers. Admission isn't checked. That
    is the dispatcher's task, and the run has started in any case."""
    if event.attempt <= job.attempt:
        raise Refused("stale_attempt", f"job {job.job_id}: attempt {event.attempt} has started, now is {job.attempt}")
    if event.attempt > job.attempt + 1:
        raise Refused("out_of_order", f"job {job.job_id}: attempt {event.attempt} after {job.attempt}")
    return _require(job, event, job.status in ("queued", "running"))


def _job_paused(job: FineTuningJob, event: JobPaused) -> list[Event]:
    """Allowed while the status is `running`, too: the runner may have been lost before it reached a checkpoint."""
    if event.attempt != job.attempt:
        raise Refused("stale_attempt", f"job {job.job_id}: attempt {job.attempt} has started, not {event.attempt}")
    return [event] if job.pausing else []


def _check_attempt(job: FineTuningJob, event: Event, attempt: int) -> None:
    if attempt < job.attempt or (attempt == job.attempt and job.status != "running" and not _is_interruption(event)):
        raise Refused("stale_attempt", f"job {job.job_id}: {event.type} of attempt {attempt}, which is not running")
    if attempt > job.attempt:
        raise Refused("out_of_order", f"job {job.job_id}: {event.type} of attempt {attempt}, now is {job.attempt}")


def _is_interruption(event: Event) -> bool:
    return isinstance(event, RunInterrupted)


def _require(job: FineTuningJob, event: Event, legal: bool) -> list[Event]:
    if legal:
        return [event]
    raise Refused("out_of_order", f"job {job.job_id}: {event.type} while its status is {job.status}")

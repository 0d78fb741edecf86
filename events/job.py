"""`FineTuningJob`, the state of a job and the object of the API, and `evolve`, the fold that makes it from events.

There is no other job state anywhere. `evolve` never raises, so every log can be replayed.
"""

from collections.abc import Iterable
from datetime import datetime
from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema

from events.codec import AnyEvent
from events.config import Config, optional
from events.facts import (
    CancelRequested,
    CheckpointSaved,
    CheckpointsDeleted,
    DataRejected,
    DataReport,
    DataValidated,
    Defaults,
    JobAdmitted,
    JobCancelled,
    JobError,
    JobFailed,
    JobPaused,
    JobResumed,
    JobSubmitted,
    JobSucceeded,
    MetricsRecorded,
    Origin,
    PauseRequested,
    Resources,
    RunInterrupted,
    RunStarted,
    StepMetrics,
)
from events.frozen import changed
from events.store import Recorded

Status = Literal["validation", "queued", "running", "failed", "success", "cancelled"]
PAUSED = "paused, until it is resumed"
"""`why` of a job that a user has paused."""
TERMINAL: frozenset[Status] = frozenset({"failed", "success", "cancelled"})


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Progress(_Part):
    """How far training is. After an interruption it goes back to the last checkpoint: that is where it resumes."""

    step: int = Field(description="Optimizer steps done.")
    total_steps: int
    epoch: int = Field(description="Epoch the last step belongs to, from 1; 0 before the first step.")
    n_epochs: int


class Metrics(_Part):
    """The latest value of each metric. A value that is not a number (a diverged loss) is left out."""

    loss: float | None = optional("Mean over the trained tokens of the last step; over its pairs with DPO.")
    lr: float | None = optional("Learning rate of the last step.")
    grad_norm: float | None = optional("Of the last step, before clipping.")
    tokens: int | None = optional("Tokens in the last step, padding excluded, all workers.")
    tokens_per_second: float | None = optional("All workers together.")
    peak_memory_bytes: int | None = optional("Of rank 0: device memory on CUDA, RSS on CPU.")
    token_accuracy: float | None = optional("Share of the last step's trained tokens that were the likeliest.")
    valid_loss: float | None = optional("Loss of the last evaluation on validation_data.")
    valid_token_accuracy: float | None = optional("token_accuracy of the last evaluation.")
    rewards_chosen: float | None = optional(
        "DPO: beta times the gain of the chosen answers' log-probability over the initial model, in the last step."
    )
    rewards_rejected: float | None = optional("DPO: the same of the rejected answers.")
    rewards_accuracy: float | None = optional("DPO: share of the last step's pairs whose chosen answer gained more.")
    rewards_margin: float | None = optional("DPO: rewards_chosen - rewards_rejected.")
    first_valid_loss: float | None = optional(
        "Loss on validation_data before the first step: what training started from."
    )


_MEASURED = tuple(name for name in Metrics.model_fields if name in StepMetrics.model_fields)
_COUNTED = ("tokens", "peak_memory_bytes")
_EVALUATED = frozenset({"valid_loss", "valid_token_accuracy"})
"""Metrics of an evaluation. Not every step has one."""


class Pace(_Part):
    """How long the run's steps and evaluations have taken so far, in seconds by the clock of its first worker."""

    at: datetime
    """The end of the last step or evaluation; before the first one, the start of the run."""
    steps: int = 0
    steps_s: float = 0.0
    first_s: float = 0.0
    """The first step, which is slower than the others."""
    evaluations: int = 0
    evaluations_s: float = 0.0

    def after(self, measured: list[StepMetrics]) -> "Pace":
        """The pace after more steps and evaluations. The time of a checkpoint counts as part of the step after it."""
        at, changes = self.at, {**self.__dict__}
        for metrics in measured:
            try:
                end = datetime.fromisoformat(metrics.time)
                took = max((end - at).total_seconds(), 0.0)
            except (ValueError, TypeError):  # not a time, or one without a zone: the fold must not raise
                continue
            at = end
            if metrics.loss is None:
                changes["evaluations"] += 1
                changes["evaluations_s"] += took
            else:
                changes["first_s"] = changes["first_s"] if changes["steps"] else took
                changes["steps"] += 1
                changes["steps_s"] += took
        changes["at"] = at
        return changed(self, changes)

    def remaining_s(self, steps: int, evaluations: float) -> float | None:
        """Seconds that this many more steps and evaluations will take; None before the first step."""
        if not self.steps:
            return None
        warm = self.steps - 1
        step_s = (self.steps_s - self.first_s) / warm if warm else self.first_s
        evaluation_s = self.evaluations_s / self.evaluations if self.evaluations else 0.0
        return steps * step_s + evaluations * evaluation_s


class _Saved(_Part):
    """The job at its last checkpoint, which an interruption falls back to. `step` and `epoch` as in Progress."""

    step: int = 0
    epoch: int = 0
    metrics: Metrics | None = None


class _ConfigAsSent:
    """Gives a config the JSON schema of `Config`; its value stays the JSON that was sent."""

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(Config.__pydantic_core_schema__)


class FineTuningJob(BaseModel):
    """A job. Times are UTC. A field that doesn't apply, or not yet, is absent."""

    # The API docs show that docstring. Fields marked `exclude` belong to the fold: they pickle with the object, but are
    # not part of the API.

    model_config = ConfigDict(frozen=True)

    job_id: str = Field(description="Unique identifier for the fine tuning job.")
    created: datetime = Field(description="The creation date and time of the job.")
    finished_at: datetime | None = optional("The completion date and time of the job.")
    status: Status = Field(description="The current status of the job.")
    why: str | None = optional("What the job is waiting for, or what is being done for it.")
    error: JobError | None = optional("Why the job failed and who can act on it.")
    error_path: str | None = optional("Path to the error log file.", format="uri")
    checkpoints: list[Annotated[str, Field(json_schema_extra={"format": "uri"})]] = Field(
        default=[], description="List of paths to checkpoint files for various epochs."
    )
    best_checkpoint: str | None = optional("The checkpoint with the lowest loss on validation_data.", format="uri")
    logs: str | None = optional("Path to the logs, either local or a WandB URI.", format="uri")
    input_config: Annotated[dict[str, Any], _ConfigAsSent()] = Field(description="The config as it was sent.")
    metadata: dict[str, Any] = Field(default={}, description="The config's metadata.")

    progress: Progress | None = optional("Present once training has started.")
    metrics: Metrics | None = optional("Present once the first step or evaluation was recorded.")
    attempt: int = Field(default=0, description="How often training was started, so far.")
    interruptions: int = Field(
        default=0, description="How often a run, or a runner that waited, was lost without an outcome."
    )
    max_restarts: int = Field(default=0, description="How many interruptions the job may have and still go on.")
    pause_requested: bool = Field(
        default=False, description="A pause was asked for: the job stops at a checkpoint until it is resumed."
    )
    cancel_requested: bool = Field(
        default=False, description="Cancelling was asked for: the job can't succeed any more."
    )
    resubmitted_from: Origin | None = optional("The checkpoint of an earlier job that this one starts from.")
    data: DataReport | None = optional("What validation found in the training data.")
    validation_data: DataReport | None = optional("What validation found in the validation data.")
    resources: Resources | None = optional("What the job reserves while it trains.")
    submission_id: str | None = optional("Id of the Ray Job that runs it.")

    validated: SkipJsonSchema[bool] = Field(default=False, exclude=True)
    admitted: SkipJsonSchema[bool] = Field(default=False, exclude=True)
    pausing: SkipJsonSchema[bool] = Field(default=False, exclude=True)
    """A user or the service has asked for a pause, and JobPaused has not been recorded yet."""
    idempotency_key: SkipJsonSchema[str | None] = Field(default=None, exclude=True)
    request_digest: SkipJsonSchema[str | None] = Field(default=None, exclude=True)
    openai: SkipJsonSchema[dict[str, Any] | None] = Field(default=None, exclude=True)
    defaults: SkipJsonSchema[Defaults | None] = Field(default=None, exclude=True)
    device: SkipJsonSchema[str | None] = Field(default=None, exclude=True)
    pace: SkipJsonSchema[Pace | None] = Field(default=None, exclude=True)
    saved: SkipJsonSchema[_Saved] = Field(default=_Saved(), exclude=True)
    checkpoint_versions: SkipJsonSchema[dict[str, int]] = Field(default={}, exclude=True)
    """By URI, the version of the event that saved each of `checkpoints`."""
    version: SkipJsonSchema[int] = Field(default=-1, exclude=True)
    """Version of the last event in the job's stream."""

    @property
    def paused(self) -> bool:
        """True while a user's pause holds and nothing of the job runs any more."""
        return self.pause_requested and not self.pausing and not self.over

    @property
    def over(self) -> bool:
        """True once the job has its outcome; nothing changes it after that."""
        return self.status in TERMINAL

    @property
    def base_model(self) -> str:
        """The model that training began with; if that was a checkpoint of an earlier job, the first job's model."""
        known = self.resubmitted_from.base_model if self.resubmitted_from else None
        return known or str(self.input_config.get("model", ""))

    @property
    def suffix(self) -> str | None:
        """The user's part of the model's name."""
        known = self.resubmitted_from.suffix if self.resubmitted_from else None
        return (self.openai or {}).get("suffix", known)

    def wire(self) -> dict[str, Any]:
        """The job as the API shows it: JSON values, fields without a value left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def wire_json(self) -> bytes:
        """`wire()` encoded."""
        return self.model_dump_json(exclude_none=True).encode()


def fold(history: Iterable[Recorded]) -> FineTuningJob | None:
    """The job after these events of one stream, in order; None if there are none."""
    job: FineTuningJob | None = None
    for recorded in history:
        job = evolve(job, recorded)
    return job


def evolve(job: FineTuningJob | None, recorded: Recorded) -> FineTuningJob:
    """The job after this event. Never raises: `decide` checks events before they are written. If the job is over, only
    its version changes."""
    if job is None:
        job = _begin(recorded)
    changes = {} if job.over else _changes(job, recorded.event, recorded.time)
    changes["version"] = recorded.version
    return changed(job, changes)


def _begin(recorded: Recorded) -> FineTuningJob:
    event = recorded.event
    if not isinstance(event, JobSubmitted):
        return FineTuningJob(job_id=recorded.job_id, created=recorded.time, status="validation", input_config={})
    metadata = event.config.get("metadata")
    return FineTuningJob(
        job_id=recorded.job_id,
        created=recorded.time,
        status="validation",
        input_config=event.config,
        metadata=metadata if isinstance(metadata, dict) else {},
        resources=event.resources,
        max_restarts=event.max_restarts,
        submission_id=event.submission_id,
        idempotency_key=event.idempotency_key,
        request_digest=event.request_digest,
        resubmitted_from=event.resubmitted_from,
        openai=event.openai,
        defaults=event.defaults,
    )


def _changes(job: FineTuningJob, event: AnyEvent, time: datetime) -> dict[str, Any]:
    match event:
        case DataValidated():
            reports = {"data": event.data, "validation_data": event.validation_data}
            return {"status": "queued", "validated": True, **reports}
        case JobAdmitted():
            return {"admitted": True}
        case RunStarted():
            return _started(job, event, time)
        case MetricsRecorded() if event.attempt == job.attempt:
            return _measured(job, event.steps)
        case CheckpointSaved() if event.attempt == job.attempt:
            return _saved(job, event)
        case CheckpointsDeleted():
            versions = {uri: version for uri, version in job.checkpoint_versions.items() if uri not in event.uris}
            return {"checkpoints": list(versions), "checkpoint_versions": versions}
        case RunInterrupted():
            return _interrupted(job, event)
        case PauseRequested():
            return _pausing(job, event)
        case JobPaused():
            return _paused(job)
        case JobResumed():
            return _resumed(job)
        case CancelRequested():
            return {"cancel_requested": True, "why": "cancelling"}
        case JobSucceeded():
            return _over("success", time)
        case JobCancelled():
            return _over("cancelled", time)
        case JobFailed():
            return {**_over("failed", time), "error": event.error, "error_path": event.error_path}
        case DataRejected():
            reports = {"data": event.data, "validation_data": event.validation_data}
            return {**_over("failed", time), "error": event.error, "error_path": event.error_path, **reports}
        case _:
            return {}


def _over(status: Status, time: datetime) -> dict[str, Any]:
    ended = dict.fromkeys(("admitted", "pausing", "pause_requested"), False)
    return {"status": status, "finished_at": time, "why": None, **ended}


def _started(job: FineTuningJob, event: RunStarted, time: datetime) -> dict[str, Any]:
    progress = Progress(
        step=job.saved.step,
        total_steps=event.total_steps,
        epoch=job.saved.epoch,
        n_epochs=event.n_epochs or _n_epochs(job.input_config),
    )
    return {
        "status": "running",
        "attempt": event.attempt,
        "admitted": True,
        "validated": True,
        "logs": event.logs,
        "progress": progress,
        "pace": Pace(at=time),
        "device": event.device,
        "metrics": job.saved.metrics,
        "why": _ending(job),
    }


def _interrupted(job: FineTuningJob, event: RunInterrupted) -> dict[str, Any]:
    """The job falls back to its last checkpoint; the next attempt records the lost steps again."""
    return {
        **_at_last_checkpoint(job),
        "status": "queued" if job.validated else "validation",
        "interruptions": job.interruptions + 1,
        "why": _ending(job) or f"interrupted: {event.reason}, waiting to resume",
    }


def _at_last_checkpoint(job: FineTuningJob) -> dict[str, Any]:
    changes: dict[str, Any] = {"admitted": False, "metrics": job.saved.metrics}
    if job.progress is not None:
        changes["progress"] = job.progress.model_copy(update={"step": job.saved.step, "epoch": job.saved.epoch})
    return changes


def _pausing(job: FineTuningJob, event: PauseRequested) -> dict[str, Any]:
    changes: dict[str, Any] = {"pausing": True, "pause_requested": job.pause_requested or event.by == "user"}
    if job.status != "running":
        changes["admitted"] = False  # the next in line may have its place
    return {**changes, "why": "cancelling" if job.cancel_requested else "pausing"}


def _paused(job: FineTuningJob) -> dict[str, Any]:
    """Like an interruption that isn't counted. The status of a paused job is `queued`, however far it is."""
    changes = {**_at_last_checkpoint(job), "pausing": False}
    if job.pause_requested:
        return {**changes, "status": "queued", "why": "cancelling" if job.cancel_requested else PAUSED}
    return {**changes, **_in_line(job)}


def _resumed(job: FineTuningJob) -> dict[str, Any]:
    """A job that is still stopping stops nevertheless, and then goes on."""
    changes: dict[str, Any] = {"pause_requested": False}
    return changes if job.pausing else {**changes, **_in_line(job)}


def _in_line(job: FineTuningJob) -> dict[str, Any]:
    why = "cancelling" if job.cancel_requested else "waiting to resume" if job.attempt else None
    return {"status": "queued" if job.validated else "validation", "why": why}


def _ending(job: FineTuningJob) -> str | None:
    """The `why` of a job that was asked to stop and hasn't yet."""
    return "cancelling" if job.cancel_requested else "pausing" if job.pausing else None


def _measured(job: FineTuningJob, steps: list[StepMetrics]) -> dict[str, Any]:
    changes: dict[str, Any] = {"metrics": _latest(job.metrics, steps)}
    if job.pace is not None:
        changes["pace"] = job.pace.after(steps)
    kept = [step for step in steps if step.step <= job.saved.step]
    if kept:
        changes["saved"] = job.saved.model_copy(update={"metrics": _latest(job.saved.metrics, kept)})
    last = steps[-1]
    if job.progress is not None and last.step >= job.progress.step:
        changes["progress"] = changed(job.progress, {"step": last.step, "epoch": last.epoch})
    return changes


def _saved(job: FineTuningJob, event: CheckpointSaved) -> dict[str, Any]:
    """A checkpoint is recorded once it is on disk; training may have gone on meanwhile."""
    progress, metrics = job.progress, job.metrics
    if progress is not None and progress.step > event.step:
        values: dict[str, float] = {name: value for name, value in event.metrics.items() if isfinite(value)}
        values |= {name: int(values[name]) for name in _COUNTED if name in values}
        of_step = {name: values.get(name) for name in _MEASURED if name in values or name not in _EVALUATED}
        metrics = (metrics or Metrics()).model_copy(update=of_step)
    epoch = event.epoch if progress is None else _epoch_of(event.step, progress)
    if progress is not None and event.step > progress.step:
        progress = progress.model_copy(update={"step": event.step, "epoch": epoch})
    versions = job.checkpoint_versions | {event.uri: job.version + 1}
    return {
        "checkpoints": list(versions),
        "checkpoint_versions": versions,
        "progress": progress,
        "best_checkpoint": event.uri if event.best else job.best_checkpoint,
        "saved": _Saved(step=event.step, epoch=epoch, metrics=metrics),
    }


def _epoch_of(step: int, progress: Progress) -> int:
    """The epoch that the step belongs to: all epochs have the same number of steps."""
    return -(-step * progress.n_epochs // max(progress.total_steps, 1))


def _latest(metrics: Metrics | None, steps: list[StepMetrics]) -> Metrics:
    metrics = metrics or Metrics()
    values: dict[str, float | None] = {"first_valid_loss": metrics.first_valid_loss}
    for step in steps:
        measured = step.__dict__  # at half the cost of `getattr`
        for name in _MEASURED:
            if (value := measured[name]) is not None:
                values[name] = value if isfinite(value) else None
        if values["first_valid_loss"] is None:
            values["first_valid_loss"] = values.get("valid_loss")
    return changed(metrics, values)


def _n_epochs(config: dict[str, Any]) -> int:
    """The config's number of epochs, for runs that didn't record theirs (extras and overrides may have changed it)."""
    options = config.get("fine_tuning_options")
    sent = options.get("n_epochs") if isinstance(options, dict) else None
    return sent if isinstance(sent, int) else 1

"""The events of a job's history: named in the past tense, frozen, versioned.

Each event is a pydantic model with a `type` tag; `Event` is their union. An event that was written is never changed: a
new field gets a default, and a changed meaning gets a new `v` and an upcaster in `events.codec`.

`attempt` counts the runs of the training function for a job, from 1. An event about training names its attempt, so that
events of a run that was replaced can be refused.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _writable(text: str) -> str:
    """`text` with what isn't a character (half a surrogate pair, from an odd file name) replaced by '?'."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


Text = Annotated[str, AfterValidator(_writable)]
"""Free text for people. It may quote anything, and recording a failure must not fail because of its message."""


class _Value(BaseModel):
    # A loss may be NaN or infinite: stored as a string, so that it is plain JSON and reads back as the same number.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Fact(_Value):
    v: int = 1


class JobError(_Value):
    """Why a job failed. `fault` says who can act: the `user`; whoever runs the `infrastructure`; or either, if a
    smaller job or larger machines would do (`capacity`). docs/errors.md lists the codes."""

    code: str = Field(description="A stable word for programs: `invalid_data`, `model_not_found`, `runner_died`, ...")
    message: Text = Field(description="What happened and what to do next, for people.")
    param: str | None = Field(default=None, description="The field of the request that is to blame, if one is.")
    fault: Literal["user", "capacity", "infrastructure"] = Field(description="Who can act on it.")
    rank: int | None = Field(default=None, ge=0, description="The worker that failed first, if one did.")
    line: int | None = Field(default=None, ge=1, description="The first bad line of the data file, from 1.")
    suggestion: Text | None = Field(default=None, description="What to do next; the message ends with it.")
    retryable: bool | None = Field(
        default=None,
        description="Whether the same request may succeed when it is submitted again unchanged. Absent in jobs that "
        "failed before this was recorded.",
    )


class LineError(_Value):
    """One bad row of a data file."""

    line: int = Field(ge=1, description="Line number in the file, from 1.")
    message: Text


class DataReport(_Value):
    """What validation found in one data file. Every count is of rows or tokens of the whole file."""

    uri: str
    rows: int = Field(description="Rows that will be trained on (or evaluated); a pair of preferences counts as one.")
    invalid_rows: int
    tokens: int = Field(description="Tokens after truncation.")
    trained_tokens: int = Field(description="Tokens that carry loss, after truncation.")
    truncated_rows: int
    partly_shown_rows: int = Field(
        default=0,
        description="Rows where the model's chat template shows only part of a message to train on (it may drop "
        "reasoning); the rest isn't trained.",
    )
    unprompted_rows: int = Field(
        default=0,
        description="Rows with an answer to train on that doesn't continue the model's generation prompt (which may "
        "begin it with `<think>`).",
    )
    max_seq_len: int = Field(description="Longest row allowed, in tokens.")
    length_histogram: dict[str, int] = Field(
        description="Rows by tokenised length before truncation; the key is the upper bound of a power-of-two bucket."
    )
    errors: list[LineError] = Field(description="The first 20 bad rows.")


class Resources(_Value):
    """What a job holds while it trains: `workers` bundles of one placement group."""

    workers: int = Field(ge=1)
    nodes: int = Field(ge=1, description="With more than one, workers are spread over exactly this many nodes.")
    cpus_per_worker: float = Field(gt=0)
    gpus_per_worker: float = Field(ge=0)


class StepMetrics(_Value):
    """One optimizer step (or, where only `valid_loss` is set, one evaluation after `step` steps)."""

    step: int = Field(ge=0, description="Optimizer steps done, over all epochs and attempts.")
    epoch: int = Field(ge=0, description="Epoch the step belongs to, from 1. 0: before the first step.")
    time: str = Field(description="RFC 3339 UTC, when the step ended.")
    loss: float | None = Field(
        default=None, description="Mean over the step's trained tokens, all workers; over its pairs with DPO."
    )
    lr: float | None = None
    grad_norm: float | None = Field(default=None, description="Before clipping; present when clip_grad_norm is set.")
    tokens: int | None = Field(default=None, description="Tokens in the step, padding excluded, all workers.")
    tokens_per_second: float | None = Field(default=None, description="All workers together.")
    peak_memory_bytes: int | None = Field(default=None, description="Of rank 0: device memory on CUDA, RSS on CPU.")
    token_accuracy: float | None = Field(
        default=None, description="Share of the step's trained tokens that were the model's likeliest. Absent with DPO."
    )
    valid_loss: float | None = Field(
        default=None, description="Mean over the trained tokens of validation_data; over its pairs with DPO."
    )
    valid_token_accuracy: float | None = Field(default=None, description="token_accuracy of validation_data.")
    rewards_chosen: float | None = Field(
        default=None,
        description="DPO: beta times how much more likely the chosen answers have become than they were under the "
        "initial model (log-probability), mean over the step's pairs.",
    )
    rewards_rejected: float | None = Field(default=None, description="DPO: the same of the rejected answers.")
    rewards_accuracy: float | None = Field(
        default=None, description="DPO: share of the step's pairs whose chosen answer has the larger reward."
    )
    rewards_margin: float | None = Field(default=None, description="DPO: rewards_chosen - rewards_rejected.")


class Origin(_Value):
    """The checkpoint of an earlier job that a job starts from."""

    job_id: str = Field(description="The job that made the checkpoint.")
    checkpoint: str = Field(description="Its URI.", json_schema_extra={"format": "uri"})
    base_model: str | None = Field(default=None, description="The model that the first job of the chain began with.")
    suffix: str | None = Field(
        default=None, description="The suffix in the name of the earlier job's model, which this job's model keeps."
    )
    model: str | None = Field(
        default=None, description="The name or id that /fine_tuning/jobs/submit was given for the checkpoint."
    )


class Defaults(_Value):
    """What holds in a job for settings that a request may leave open, and for which a later version of Tunewright may
    choose something else. A job goes on as it began, whatever version resumes it."""

    batch_size: int = Field(ge=1)
    lr: float


class JobSubmitted(Fact):
    type: Literal["JobSubmitted"] = "JobSubmitted"
    config: dict[str, Any] = Field(
        description="The Config as the user sent it, but with a tuned model's directory for its name."
    )
    resources: Resources
    defaults: Defaults | None = Field(default=None, description="Absent in jobs from before this was recorded.")
    max_restarts: int = Field(ge=0, description="How often the run may be started again after an interruption.")
    submission_id: str = Field(
        description="Id of the Ray Job that runs it: the job id, unless the user made the Ray Job."
    )
    idempotency_key: str | None = None
    request_digest: str | None = Field(
        default=None, description="Of the config and who sent it: what an identical request is recognised by."
    )
    resubmitted_from: Origin | None = None
    openai: dict[str, Any] | None = Field(
        default=None, description="The request as it was sent, where it came through /v1/fine_tuning/jobs."
    )


class DataValidated(Fact):
    """Every row was read and tokenised; from here the job waits for resources."""

    type: Literal["DataValidated"] = "DataValidated"
    data: DataReport
    validation_data: DataReport | None = None


class DataRejected(Fact):
    """Terminal: the data (or the model it is for) can't be trained on."""

    type: Literal["DataRejected"] = "DataRejected"
    error: JobError
    error_path: str
    data: DataReport | None = None
    validation_data: DataReport | None = None


class JobAdmitted(Fact):
    """The job has reached the head of the line; its placement group may be asked for."""

    type: Literal["JobAdmitted"] = "JobAdmitted"


class RunStarted(Fact):
    """The training function runs on every worker."""

    type: Literal["RunStarted"] = "RunStarted"
    attempt: int = Field(ge=1)
    workers: int
    nodes: int
    device: str = Field(description="`cpu` or the accelerator's name, e.g. `NVIDIA H200`.")
    total_steps: int
    n_epochs: int | None = Field(default=None, description="Epochs, by the plan. None: as in the config.")
    logs: str = Field(description="Where the logger writes: a file URI or the W&B run's URL.")


class MetricsRecorded(Fact):
    type: Literal["MetricsRecorded"] = "MetricsRecorded"
    attempt: int = Field(ge=1)
    steps: list[StepMetrics] = Field(min_length=1)


class CheckpointSaved(Fact):
    type: Literal["CheckpointSaved"] = "CheckpointSaved"
    attempt: int = Field(ge=1)
    step: int
    epoch: int = Field(description="Epochs completed at this checkpoint.")
    uri: str
    metrics: dict[str, float] = Field(
        default_factory=dict, description="Of its step, and of the evaluation after that, if there was one."
    )
    best: bool = Field(default=False, description="The lowest validation loss so far was measured at it.")


class CheckpointsDeleted(Fact):
    """They are about to be deleted from disk: the job keeps its last ones and its best one only."""

    type: Literal["CheckpointsDeleted"] = "CheckpointsDeleted"
    attempt: int = Field(ge=1)
    uris: list[str] = Field(min_length=1)


class RunInterrupted(Fact):
    """The run, or a runner that waited, was lost without an outcome; the job waits for resources again."""

    type: Literal["RunInterrupted"] = "RunInterrupted"
    attempt: int = Field(ge=0, description="0: it was lost before the training function ran.")
    reason: Text


class PauseRequested(Fact):
    """The job is to stop at a checkpoint and to free what it holds; a run stops after the step it is in."""

    type: Literal["PauseRequested"] = "PauseRequested"
    by: Literal["user", "shutdown", "node_drain"] = Field(
        default="user",
        description="A `user`'s pause lasts until JobResumed. Otherwise the job goes on by itself: once the service is "
        "there again after its `shutdown`, or on another node than the one that is drained.",
    )


class JobPaused(Fact):
    """The job's runner has ended and its resources are free again."""

    type: Literal["JobPaused"] = "JobPaused"
    attempt: int = Field(ge=0, description="The last run until then; 0: there was none.")


class JobResumed(Fact):
    """The user's pause is over: the job stands in line again."""

    type: Literal["JobResumed"] = "JobResumed"


class CancelRequested(Fact):
    type: Literal["CancelRequested"] = "CancelRequested"


class JobSucceeded(Fact):
    type: Literal["JobSucceeded"] = "JobSucceeded"
    attempt: int | None = Field(default=None, description="The run that succeeded; a stale one is refused.")


class JobFailed(Fact):
    type: Literal["JobFailed"] = "JobFailed"
    attempt: int | None = Field(default=None, description="The run that failed, if one did; a stale one is refused.")
    error: JobError
    error_path: str | None = None


class JobCancelled(Fact):
    """The job's resources are free again."""

    type: Literal["JobCancelled"] = "JobCancelled"


Event = Annotated[
    JobSubmitted
    | DataValidated
    | DataRejected
    | JobAdmitted
    | RunStarted
    | MetricsRecorded
    | CheckpointSaved
    | CheckpointsDeleted
    | RunInterrupted
    | PauseRequested
    | JobPaused
    | JobResumed
    | CancelRequested
    | JobSucceeded
    | JobFailed
    | JobCancelled,
    Field(discriminator="type"),
]

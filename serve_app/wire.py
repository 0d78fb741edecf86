"""Bodies that exist only in HTTP: errors, small requests, the list of jobs, the lines of a tail, health.

`Config` and `FineTuningJob` are in `events`, because the event log uses them, too.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.json_schema import SkipJsonSchema

from events.config import optional
from events.job import FineTuningJob

ErrorType = Literal[
    "invalid_request_error",
    "not_found_error",
    "conflict_error",
    "rate_limit_error",
    "service_unavailable_error",
    "server_error",
]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ProblemDetail(_Wire):
    """One of the things wrong with a request."""

    param: str | None = Field(description="Dotted path of the field; null if no single field is to blame.")
    message: str = Field(description="What is wrong, and what would be right, for people.")
    code: str = Field(description="A stable word for programs.")


class ErrorBody(_Wire):
    """What went wrong, for people and for programs."""

    message: str = Field(description="What happened and what to do next, for people. Names every problem.")
    type: ErrorType = Field(description="The class of the error; it goes with the status code.")
    param: str | None = Field(description="The field to blame; the first one, if there are several.")
    code: str | None = Field(description="A stable word for programs: `unknown_job`, `unknown_field`, ...")
    errors: list[ProblemDetail] | None = optional("Every problem of the request. With status 422, or 400 under /v1.")


class ErrorEnvelope(_Wire):
    """What every error of the service looks like."""

    error: ErrorBody


class CancelRequest(_Wire):
    """What POST /fine_tuning/jobs/cancel takes."""

    job_id: str = Field(min_length=1, max_length=128, description="The job to cancel.")


class PauseRequest(_Wire):
    """What POST /fine_tuning/jobs/pause takes."""

    job_id: str = Field(min_length=1, max_length=128, description="The job to pause.")


class ResumeRequest(_Wire):
    """What POST /fine_tuning/jobs/resume takes."""

    job_id: str = Field(min_length=1, max_length=128, description="The job to resume.")


class ResubmitRequest(_Wire):
    """What POST /fine_tuning/jobs/resubmit takes."""

    job_id: str = Field(min_length=1, max_length=128, description="The job that made the checkpoint.")
    checkpoint: Annotated[int, Field(ge=0)] | str | SkipJsonSchema[None] = Field(
        default=None,
        description="One of the job's `checkpoints`, or the number of the step it was written after. Default: the last "
        "one.",
    )
    config: dict[str, JsonValue] = Field(
        default={},
        description="Changes to the job's `input_config`: objects are merged, null removes a field, and an object "
        "whose `finetuning_type` or `log_type` changes is replaced. `model` can't be set: it is the checkpoint.",
    )


class FineTuningJobList(_Wire):
    """One page of the jobs."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob] = Field(description="Newest first.")
    has_more: bool = Field(description="Whether there are older jobs: ask again with `after` = the last job's id.")


class Log(_Wire):
    """One line of a job's log."""

    message: str = Field(description="The log message.")
    timestamp: str = Field(description="The timestamp of the log message.", json_schema_extra={"format": "date-time"})


class TailLine(_Wire):
    """One line of the NDJSON stream. An empty `logs` is a heartbeat, or the last line. If a stream ends without a
    `status`, the service is being restarted: reconnect with `after` = `next`."""

    logs: list[Log]
    next: int = Field(ge=0, description="Offset after these lines: send it as `after` when you reconnect.")
    status: Literal["failed", "success", "cancelled"] | None = optional(
        "Only in the last line of a job that has ended."
    )


class Health(_Wire):
    """What GET /healthz answers when all is well."""

    status: Literal["ok"] = "ok"

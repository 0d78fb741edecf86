"""The objects of OpenAI's API: what /v1 takes and answers. The reference is the client's own types, `openai.types`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from events.config import optional

HOUR, MONTH = 3600, 30 * 24 * 3600
FileStatus = Literal["uploaded", "processed", "error"]
JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled", "paused"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class OpenAIExpiresAfter(_Request):
    """When a file is deleted by itself. A file that a job uses stays until the job is over."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=HOUR, le=MONTH, description="Seconds after its creation: an hour to 30 days.")


class OpenAIFileForm(_Request):
    """What POST /v1/files takes, as multipart/form-data."""

    file: str = Field(description="The file, in JSONL.", json_schema_extra={"format": "binary"})
    purpose: Literal["fine-tune"]


class OpenAIPartForm(_Request):
    """What POST /v1/uploads/{upload_id}/parts takes, as multipart/form-data."""

    data: str = Field(description="The bytes of the part, at most 64 MiB.", json_schema_extra={"format": "binary"})


class OpenAIFile(_Answer):
    """A file. Result files (`fine-tune-results`) belong to their jobs and can't be deleted."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: FileStatus = "processed"
    status_details: str | None = None


class OpenAIFileDeleted(_Answer):
    """The file was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class OpenAIUploadRequest(_Request):
    """What POST /v1/uploads takes."""

    bytes: int = Field(ge=1, description="Size of the whole file.")
    filename: str = Field(min_length=1, max_length=1024)
    mime_type: str = Field(max_length=255)
    purpose: Literal["fine-tune"]
    expires_after: OpenAIExpiresAfter | None = optional("Default: it stays until it is deleted.")


class OpenAIUploadCompletion(_Request):
    """What POST /v1/uploads/{upload_id}/complete takes."""

    part_ids: list[Annotated[str, Field(max_length=64)]] = Field(
        min_length=1, max_length=10_000, description="The ids of all parts, in the order of the file."
    )
    md5: str | None = optional("Of the whole file, in hexadecimal; refused if the bytes that arrived have another one.")


class OpenAIUpload(_Answer):
    """A file that is uploaded in parts. It expires an hour after its creation, unless it is completed."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: OpenAIFile | None = None


class OpenAIUploadPart(_Answer):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


Auto = Literal["auto"]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Multiplier = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]


class OpenAIHyperparameters(_Request):
    """`auto`: 8 rows in a batch, a multiplier of 1, 3 epochs."""

    batch_size: Auto | BatchSize = Field(default="auto", description="Rows (pairs, with DPO) in each step.")
    learning_rate_multiplier: Auto | Multiplier = Field(
        default="auto", description="Times the service's default rate for LoRA: 6e-4, with DPO 1e-5."
    )
    n_epochs: Auto | Epochs = Field(default="auto", description="Passes over the file.")


class OpenAIDpoHyperparameters(OpenAIHyperparameters):
    """`auto` as for supervised fine-tuning, but 4 pairs in a batch; a beta of 0.1."""

    beta: Auto | Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = Field(
        default="auto", description="Weight of the penalty for moving away from the initial model."
    )


class OpenAISupervised(_Request):
    """Training on answers."""

    hyperparameters: OpenAIHyperparameters | None = optional("Default: all `auto`.")


class OpenAIDpo(_Request):
    """Training on preferences."""

    hyperparameters: OpenAIDpoHyperparameters | None = optional("Default: all `auto`.")


class OpenAIMethod(_Request):
    """How to train. `reinforcement` is not offered."""

    type: Literal["supervised", "dpo"]
    supervised: OpenAISupervised | None = optional("Only with type `supervised`.")
    dpo: OpenAIDpo | None = optional("Only with type `dpo`.")


class OpenAIWandb(_Request):
    """Where metrics go. The API key comes from the workers' environment."""

    project: str = Field(min_length=1, max_length=128)
    name: str | None = optional("The run's name. Default: the job's id.", maxLength=128)
    entity: str | None = optional("The W&B team or user. Default: that of the API key.", maxLength=128)
    tags: list[str] | None = optional("The run's tags.")


class OpenAIIntegration(_Request):
    """Metrics to Weights & Biases."""

    type: Literal["wandb"]
    wandb: OpenAIWandb


Suffix = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""Without control characters, so that the name of a model stays on one line."""
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]


class OpenAIJobRequest(_Request):
    """What POST /v1/fine_tuning/jobs takes."""

    model: str = Field(
        min_length=1, max_length=1024, description="A name from GET /v1/models, or any base model that jobs take."
    )
    training_file: str = Field(min_length=1, max_length=4096, description="The id of an uploaded file, or a URI.")
    validation_file: Annotated[str, Field(min_length=1, max_length=4096)] | None = optional(
        "The same, for validation. Default: none."
    )
    method: OpenAIMethod | None = optional("Default: supervised.")
    hyperparameters: OpenAIHyperparameters | None = optional("The old place of `method.supervised.hyperparameters`.")
    suffix: Suffix | None = optional("Becomes part of the model's name.")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = optional("Default: 42.")
    integrations: Annotated[list[OpenAIIntegration], Field(max_length=1)] | None = optional("At most one.")
    metadata: Annotated[dict[MetadataKey, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = (
        optional("Stored with the job and returned with it: up to 16 pairs of strings.")
    )


class OpenAIError(_Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class OpenAIJob(_Answer):
    """A job. `checkpoints` is this service's own: where the weights are."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: OpenAIError | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    method: dict[str, Any]
    model: str
    organization_id: str = "tunewright"
    result_files: list[str]
    seed: int
    status: JobStatus
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    user_provided_suffix: str | None
    checkpoints: list[str] = Field(description="URIs of its checkpoints, oldest first.")


class OpenAIJobEvent(_Answer):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, int | float | None]


class OpenAICheckpoint(_Answer):
    """A checkpoint. `uri` is this service's own: where the weights are."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, int | float | None]
    step_number: int
    uri: str


WebhookEventType = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
WebhookEventTypes = Annotated[list[WebhookEventType], Field(min_length=1, max_length=3)]
WebhookName = Annotated[str, Field(min_length=1, max_length=256)]
WebhookUrl = Annotated[str, Field(min_length=1, max_length=2048)]


class OpenAIWebhookRequest(_Request):
    """What POST /v1/webhook_endpoints takes."""

    name: WebhookName = Field(description="A name of your choice.")
    url: WebhookUrl = Field(description="Where events are sent: http or https, a public host, no credentials.")
    event_types: WebhookEventTypes = Field(description="The types of event to send.")


class OpenAIWebhookUpdate(_Request):
    """What POST /v1/webhook_endpoints/{webhook_endpoint_id} takes. What you leave out stays as it is."""

    name: WebhookName | None = optional("A new name.")
    url: WebhookUrl | None = optional("A new URL.")
    event_types: WebhookEventTypes | None = optional("The types of event to send from now on.")


class OpenAIWebhookRotation(_Request):
    """What POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret takes."""

    keep_old_secret_active_for_24_hours: bool | None = optional(
        "Also sign with the old secret, for a day. Default: false."
    )


class OpenAIWebhookTest(_Request):
    """What POST /v1/webhook_endpoints/{webhook_endpoint_id}/test takes."""

    event_type: WebhookEventType


class OpenAIWebhookEndpoint(_Answer):
    """A URL that is called when a job is over. `status` is this service's own: it is `disabled` after a 410 Gone."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[WebhookEventType]
    signing_secret_hint: str
    status: Literal["enabled", "disabled"]


class OpenAIWebhookEndpointWithSecret(OpenAIWebhookEndpoint):
    """The same with its secret, which is shown only this once."""

    signing_secret: str


class OpenAIWebhookEndpointDeleted(_Answer):
    """The endpoint is deleted, and with it whatever was still to be sent to it."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


class OpenAIWebhookTestResult(_Answer):
    """How the endpoint answered."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: WebhookEventType
    status_code: int
    success: Literal[True] = True


class OpenAIWebhookEventTypeList(_Answer):
    """The types of event that can be sent."""

    object: Literal["list"] = "list"
    data: list[WebhookEventType]


class OpenAIWebhookDelivery(_Answer):
    """An event on its way to an endpoint. This service's own."""

    id: str = Field(description="The event's id: the receiver gets it as `id` and as the header `webhook-id`.")
    object: Literal["webhook_endpoint.delivery"] = "webhook_endpoint.delivery"
    created_at: int = Field(description="When the job was over.")
    event_type: WebhookEventType
    job_id: str
    status: Literal["pending", "delivered", "failed"] = Field(
        description="`failed`: no more attempts are made; POST .../redeliver sends it again."
    )
    attempts: int
    last_attempt_at: int | None
    next_attempt_at: int | None
    last_status_code: int | None
    last_error: str | None


class _Page(_Answer):
    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool = Field(description="Whether there are more: ask again with `after` = last_id.")


class OpenAIFileList(_Page):
    """Files."""

    data: list[OpenAIFile]


class OpenAIJobList(_Page):
    """Jobs, newest first."""

    data: list[OpenAIJob]


class OpenAIEventList(_Page):
    """Events, newest first."""

    data: list[OpenAIJobEvent]


class OpenAICheckpointList(_Page):
    """Checkpoints, newest first."""

    data: list[OpenAICheckpoint]


class OpenAIWebhookEndpointList(_Page):
    """Webhook endpoints, newest first."""

    data: list[OpenAIWebhookEndpoint]


class OpenAIWebhookDeliveryList(_Page):
    """Deliveries, newest first."""

    data: list[OpenAIWebhookDelivery]

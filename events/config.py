"""`Config`: a request for a fine-tuning job, with the names of `fine_tuning_api.yaml`.

These models are the wire format of POST /fine_tuning/jobs/submit. They hold the values as the user sent them;
`trainers.planning.plan.Plan` is what they mean for a training run (merged, typed, checked).

A field that is absent or null takes its documented default. Unknown fields are refused by name. `JobSubmitted` records,
and the API returns, the JSON as it was sent, not a dump of the Config.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

MAX_DEPTH = 64
"""How deep `extras` and `metadata` may nest."""

FullTag = Literal["full", "FullFineTuneOptions"]
LoraTag = Literal["lora", "LoraFineTuneOptions"]
DiskTag = Literal["disk", "DiskLogger"]
WandBTag = Literal["wandb", "WandBLogger"]


def optional(description: str, **schema: JsonValue) -> Any:  # noqa: ANN401  -- Field() of any type
    """A field of type `X | None` that may be absent. If its default isn't a constant, the description states it.

    `schema` is added to its JSON schema, which doesn't mention null: the API neither asks for nulls nor sends any.
    """

    def finish(generated: dict[str, Any]) -> None:  # pydantic may apply it to a finished schema again
        generated.pop("default", None)
        for kind in generated.pop("anyOf", []):
            if kind != {"type": "null"}:
                generated.update(kind)
        generated.update(schema)

    return Field(default=None, description=description, json_schema_extra=finish)


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    """Refuses values that can't be written as JSON in UTF-8 and read back the same: they are stored and returned."""
    _check_json(value, depth=1)
    return value


def _check_json(value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    match value:
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"the key {key!r} is not a string")  # noqa: TRY004  -- what pydantic reports
                _check_json(key, depth)
                _check_json(item, depth + 1)
        case list():
            for item in value:
                _check_json(item, depth + 1)
        case str():
            if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
                raise ValueError("a string contains half of a surrogate pair")
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{value} is not JSON")
        case bool() | int() | None:
            pass
        case _:
            raise ValueError(f"{type(value).__name__} is not JSON")


JsonObject = Annotated[dict[str, Any], AfterValidator(_plain_json)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, sent: object) -> object:
        """An option set to null takes its default, as if it had not been sent. What lies inside a value is kept."""
        if not isinstance(sent, dict):
            return sent
        return {name: value for name, value in sent.items() if value is not None or name not in cls.model_fields}


class FullFineTuneOptions(_Wire):
    """Every weight is trained."""

    finetuning_type: FullTag | None = optional("Which of the two this is. May be left out if the other fields tell.")
    enable_activation_checkpointing: bool = Field(
        default=True,
        description="Recompute activations in the backward pass: less memory, about a third more time. On CPUs, done "
        "only if a worker's share of its node's memory could be too small otherwise.",
    )
    memory_efficient_fsdp_wrap: bool = Field(
        default=True,
        description="Shard the embedding and the output head as FSDP units of their own. Needs more than one worker; "
        "has no effect on a model whose head is tied to its embedding.",
    )
    fsdp_cpu_offload: bool = Field(
        default=True,
        description="Keep sharded parameters, gradients and optimizer state in host memory. Needs more than one "
        "worker and a GPU; elsewhere it has no effect, and the job's log says so.",
    )


class LoraFineTuneOptions(_Wire):
    """Low-rank adapters on the chosen linear layers; the base model stays frozen."""

    finetuning_type: LoraTag | None = optional("Which of the two this is. May be left out if the other fields tell.")
    lora_attn_modules: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "output_proj"],
        description="Attention layers that get an adapter: any of q_proj, k_proj, v_proj, output_proj.",
    )
    apply_lora_to_mlp: bool = Field(default=False, description="Put adapters on the feed-forward layers, too.")
    apply_lora_to_output: bool = Field(
        default=False,
        description="Put an adapter on the output head, too. Refused if the head is tied to the embedding.",
    )
    lora_rank: int = Field(default=8, ge=1, le=1024, description="Rank r of the update B·A.")
    lora_alpha: int = Field(default=16, ge=1, description="Scale: the update is multiplied by alpha / rank.")


class DiskLogger(_Wire):
    """Metrics as JSON lines in the job's directory."""

    log_type: DiskTag | None = optional("Which of the two this is. May be left out if the other fields tell.")
    filename: str = Field(
        default="metrics.jsonl",
        min_length=1,
        max_length=255,
        description="A plain file name in the job's directory: letters, digits, '.', '_' and '-'.",
    )


class WandBLogger(_Wire):
    """Metrics to Weights & Biases. The API key comes from the workers' environment; without one the run is offline."""

    log_type: WandBTag | None = optional("Which of the two this is. May be left out if the other fields tell.")
    project: str = Field(default="tunewright", min_length=1, max_length=128, description="The W&B project.")
    entity: Annotated[str, Field(min_length=1, max_length=128)] | None = optional(
        "The W&B team or user. Default: that of the API key."
    )
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = optional(
        "The run's name. Default: the job's id."
    )
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(default=[], description="The run's tags.")


def _choose(value: object, tag_field: str, tags: dict[str, str], fields: dict[str, set[str]]) -> str | None:
    """The member of a union that `value` is meant to be: by its tag, else by the fields that only one member has. If no
    member has any of its fields: the first of `fields`, which then refuses them by name.

    Returns None if neither decides; pydantic then reports the union's custom error.
    """
    if not isinstance(value, dict):
        return {cls: cls for cls in fields}.get(type(value).__name__)
    tag = value.get(tag_field)
    if tag is not None:
        return tags.get(tag) if isinstance(tag, str) else None
    sent = {name for name, item in value.items() if item is not None}
    named = {name for name, own in fields.items() if own & sent}
    if sent and not named:
        return next(iter(fields))
    return named.pop() if len(named) == 1 else None


def _finetuning_type(value: object) -> str | None:
    return _choose(
        value,
        "finetuning_type",
        {"full": "FullFineTuneOptions", "lora": "LoraFineTuneOptions"}
        | {name: name for name in ("FullFineTuneOptions", "LoraFineTuneOptions")},
        {
            cls.__name__: set(cls.model_fields) - {"finetuning_type"}
            for cls in (LoraFineTuneOptions, FullFineTuneOptions)
        },
    )


def _log_type(value: object) -> str | None:
    return _choose(
        value,
        "log_type",
        {"disk": "DiskLogger", "wandb": "WandBLogger"} | {name: name for name in ("DiskLogger", "WandBLogger")},
        {cls.__name__: set(cls.model_fields) - {"log_type"} for cls in (DiskLogger, WandBLogger)},
    )


CustomTrainingOptions = Annotated[
    Annotated[FullFineTuneOptions, Tag("FullFineTuneOptions")]
    | Annotated[LoraFineTuneOptions, Tag("LoraFineTuneOptions")],
    Discriminator(
        _finetuning_type,
        custom_error_type="ambiguous_finetuning_type",
        custom_error_message="can't tell full from LoRA fine-tuning here: set finetuning_type to 'full' or 'lora' "
        "(or send fields of one of them only); QLoRA, DoRA and QAT are keys of extras",
    ),
]
Logger = Annotated[
    Annotated[DiskLogger, Tag("DiskLogger")] | Annotated[WandBLogger, Tag("WandBLogger")],
    Discriminator(
        _log_type,
        custom_error_type="ambiguous_log_type",
        custom_error_message="can't tell which logger this is: set log_type to 'disk' or 'wandb' "
        "(or send fields of one of them only)",
    ),
]


class FineTuningOptions(_Wire):
    """How to train. Every option has a default."""

    n_epochs: int = Field(default=1, ge=1, le=10_000, description="Passes over the training data.")
    batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = optional(
        "Rows per micro-batch and worker. Default: 8 rows, 4 packs or, with DPO, 4 pairs."
    )
    lr: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = optional(
        "Peak learning rate. Default: 4e-5 for full fine-tuning, 6e-4 for LoRA; with DPO 1e-6 and 1e-5.", format="float"
    )
    gradient_accumulation_steps: int = Field(
        default=1,
        ge=1,
        le=65_536,
        description="Micro-batches whose gradients are summed before each optimizer step.",
    )
    seed: int = Field(
        default=42, ge=0, le=2**32 - 1, description="Seeds initialisation of adapters, data order and dropout."
    )
    shuffle: bool = Field(
        default=True,
        description="Put the rows into a new order in each epoch, which follows from the seed and the epoch.",
    )
    custom_training_options: CustomTrainingOptions = Field(
        default_factory=LoraFineTuneOptions,
        description="Full or LoRA fine-tuning. Default: LoRA of rank 8 on all attention layers.",
        json_schema_extra={"discriminator": {"propertyName": "finetuning_type"}},
    )
    extras: JsonObject = Field(
        default_factory=dict,
        description="A torchtune config fragment, nested or with dotted keys, merged last. docs/configuration.md "
        "lists the keys; an unknown one is an error that names the nearest known key.",
    )


class Config(_Wire):
    """What POST /fine_tuning/jobs/submit takes. `model` and `data` are required."""

    model: str = Field(
        min_length=1,
        max_length=1024,
        description="The model identifier that you want to fine tune: a short alias, a Hugging Face id "
        "(`org/name`, `org/name@revision`), a directory or URI in Hugging Face layout, or the name of a tuned model or "
        "checkpoint (`GET /v1/models` lists them).",
    )
    data: str = Field(
        min_length=1,
        max_length=4096,
        description="Path to the JSONL file with each row representing a `TrainingDataItem`, or a `PreferenceDataItem` "
        "if `extras.loss` is DPO's.",
        json_schema_extra={"format": "uri"},
    )
    validation_data: Annotated[str, Field(min_length=1, max_length=4096)] | None = optional(
        "Path to the JSONL file used for validation metrics: its loss is measured before the first step and after "
        "each epoch.",
        format="uri",
    )
    fine_tuning_options: FineTuningOptions = Field(default_factory=FineTuningOptions)
    logger: Logger = Field(
        default_factory=DiskLogger,
        description="Where metrics go besides the event log. Default: `metrics.jsonl` in the job's directory.",
        json_schema_extra={"discriminator": {"propertyName": "log_type"}},
    )
    overrides: Annotated[str, Field(max_length=4096)] | None = optional(
        "torchrun flags (`--nproc_per_node 2 --nnodes 1 --max-restarts 3`) and `key=value` settings as `tune run` "
        "takes them. Default: one worker, three restarts."
    )
    metadata: JsonObject = Field(
        default_factory=dict, description="Anything of yours: stored with the job and returned with it."
    )

"""What a Config means for a training run: merged, typed, checked.

`make_plan` merges the request's options, the `key=value` part of `overrides` and `extras`, the later over the earlier,
and reports everything that is wrong at once. A `Plan` is plain data and travels to the workers as a dict.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from events.config import Config, LoraFineTuneOptions, WandBLogger
from events.facts import Defaults
from events.job import FineTuningJob
from trainers.errors import ConfigProblems, Problem
from trainers.planning.components import DEFAULTS, DPO_LOSS, shardable
from trainers.planning.merge import Merged
from trainers.planning.overrides import parse_overrides
from trainers.planning.precision import Dtype
from trainers.settings import ERROR_FILE

EXTRAS = "fine_tuning_options.extras"
COMPILED = "compiled"
"""Where `compile` keeps what it makes, in a job's directory."""
REFERENCE = "reference.safetensors"
"""What DPO keeps of the initial model, in a job's directory."""
RESERVED_NAMES = frozenset(
    {"data", "checkpoints", COMPILED, REFERENCE, "log.ndjson", "log.index", ERROR_FILE, "wandb", "ray"}
)
"""Names in a job's directory that the service itself uses."""


MethodName = Literal["full", "lora", "dora", "qlora", "qat"]
"""The ways of training, of which requests tell two apart: `full` and `qat` train every weight, the others adapters."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSpec(_Frozen):
    """Which linear layers get an adapter W + alpha/rank · B·A, and its size."""

    attn_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "output_proj")
    mlp: bool = False
    output: bool = False
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0


class ComponentSpec(_Frozen):
    """A component of the allow-list and the arguments the user gave it; the recipe adds the computed ones."""

    component: str
    kwargs: dict[str, Any] = Field(default_factory=dict)


class DiskLog(_Frozen):
    kind: Literal["disk"] = "disk"
    filename: str


class WandBLog(_Frozen):
    kind: Literal["wandb"] = "wandb"
    project: str
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()


class Plan(_Frozen):
    """One training run. Round-trips through JSON: `Plan.model_validate(plan.model_dump(mode="json")) == plan`."""

    model: str
    data: str
    validation_data: str | None = None

    method: MethodName
    lora: LoraSpec | None = None

    n_epochs: int = 1
    batch_size: int = 8
    lr: float
    gradient_accumulation_steps: int = 1
    seed: int = 42
    shuffle: bool = True
    group_by_length: bool = False
    max_steps_per_epoch: int | None = None
    clip_grad_norm: float | None = None
    optimizer: ComponentSpec = ComponentSpec(component=DEFAULTS["optimizer"])
    lr_scheduler: ComponentSpec | None = ComponentSpec(component=DEFAULTS["lr_scheduler"])
    loss: ComponentSpec = ComponentSpec(component=DEFAULTS["loss"])
    quantizer: ComponentSpec | None = None

    packed: bool = False
    max_seq_len: int | None = None
    max_invalid_fraction: float = 0.0

    dtype: Dtype | None = None
    compile: bool = False
    enable_activation_checkpointing: bool = False
    memory_efficient_fsdp_wrap: bool = False
    fsdp_cpu_offload: bool = False

    log_every_n_steps: int = 1
    save_every_n_steps: int | None = None
    keep_last_n_checkpoints: int | None = None
    run_val_every_n_steps: int | None = None
    early_stopping_patience: int | None = None
    logger: Annotated[DiskLog | WandBLog, Field(discriminator="kind")] = DiskLog(filename="metrics.jsonl")

    nnodes: int = 1
    nproc_per_node: int = 1
    max_restarts: int = 3

    @property
    def defaults(self) -> Defaults:
        return Defaults(batch_size=self.batch_size, lr=self.lr)

    @property
    def workers(self) -> int:
        return self.nnodes * self.nproc_per_node

    @property
    def updates_in_backward(self) -> bool:
        """Whether each weight is updated as soon as the backward pass has its gradient, so that gradients never take
        memory together. Only where a step's gradient is complete then and nothing else needs it; and where it pays:
        not for adapters. bitsandbytes synchronises the device at each update."""
        return (
            self.lora is None
            and self.workers == 1
            and self.gradient_accumulation_steps == 1
            and self.clip_grad_norm is None
            and not self.optimizer.component.startswith("bitsandbytes.")
        )

    @property
    def fused_adam(self) -> bool:
        """Whether the optimizer is torch's Adam or AdamW in one pass over memory: unless the plan asks for another."""
        kwargs = self.optimizer.kwargs
        other = kwargs.get("foreach") is not None or kwargs.get("fused") is False
        return self.optimizer.component in ("torch.optim.Adam", "torch.optim.AdamW") and not other

    @property
    def pairs(self) -> bool:
        """Whether it trains on preferences: each row of data is a pair of dialogs."""
        return self.loss.component == DPO_LOSS


DEFAULT_LR = {"full": 4e-5, "lora": 6e-4}
"""torchtune's 2e-5 and 3e-4 are for half as many rows; docs/decisions/0022 compares."""
DEFAULT_DPO_LR = {"full": 1e-6, "lora": 1e-5}
"""TRL's DPOConfig has 1e-6, and its examples take ten times as much for adapters."""
DEFAULT_ROWS, DEFAULT_GROUPS = 8, 4
"""Rows in a micro-batch; pairs, of two rows each, or packs."""
_LORA_FIELDS = {
    "lora_attn_modules": "attn_modules",
    "apply_lora_to_mlp": "mlp",
    "apply_lora_to_output": "output",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
}


def plan_of(job: FineTuningJob) -> Plan:
    """The training run of `job`. Raises ConfigProblems, or ValueError, for a job of another version of Tunewright whose
    config means nothing to this one."""
    return make_plan(Config.model_validate(job.input_config), job.defaults)


def make_plan(config: Config, defaults: Defaults | None = None) -> Plan:
    """The training run that `config` asks for; what it leaves open is as `defaults` have it, where they are given.
    Raises ConfigProblems with everything that is wrong with it."""
    options = config.fine_tuning_options
    custom = options.custom_training_options
    kind: Literal["full", "lora"] = "lora" if isinstance(custom, LoraFineTuneOptions) else "full"
    overrides, problems = parse_overrides(config.overrides)

    merged = Merged(kind)
    basics = options.model_dump(exclude={"custom_training_options", "extras"}, exclude_none=True)
    merged.options(basics, "fine_tuning_options")
    merged.options(custom.model_dump(exclude={"finetuning_type"}), "fine_tuning_options.custom_training_options")
    merged.settings(overrides.settings, lambda _: "overrides", named=True)
    merged.settings(list(options.extras.items()), lambda key: f"{EXTRAS}.{key}")

    values, components = merged.values(), merged.components()
    problems += merged.problems
    lora = {field: values.pop(key) for key, field in _LORA_FIELDS.items() if key in values}
    pairs = (components["loss"] or ("",))[0] == DPO_LOSS
    problems += _contradictions(values, lora, merged, has_validation_data=config.validation_data is not None)
    problems += _method_contradictions(kind, values, components, merged)
    if overrides.nnodes * overrides.nproc_per_node > 1:
        problems += _sharding_contradictions(kind, values, components, merged)
    if pairs and values.get("packed"):
        message = "can't be used with DPO: the rows of a pair are never packed. Leave one of the two out."
        problems.append(Problem(merged.param("packed"), message))
    problems += _logger_problems(config)
    if problems:
        raise ConfigProblems(problems)
    values = (defaults.model_dump() if defaults else {}) | values
    values.setdefault("lr", (DEFAULT_DPO_LR if pairs else DEFAULT_LR)[kind])
    values.setdefault("batch_size", DEFAULT_GROUPS if pairs or values.get("packed") else DEFAULT_ROWS)
    dora, quantized = (values.pop(key, False) for key in ("use_dora", "quantize_base"))
    method: MethodName = "qat" if components["quantizer"] else "dora" if dora else "qlora" if quantized else kind
    merged_values: dict[str, Any] = values | {name: _component(part) for name, part in components.items()}
    return Plan(
        model=config.model,
        data=config.data,
        validation_data=config.validation_data,
        method=method,
        lora=LoraSpec(**lora) if kind == "lora" else None,
        logger=_logger(config),
        nnodes=overrides.nnodes,
        nproc_per_node=overrides.nproc_per_node,
        max_restarts=overrides.max_restarts,
        **merged_values,
    )


def step_items(plan: Plan) -> int:
    """Rows, pairs or packs of a step, over all workers."""
    return plan.batch_size * plan.workers * plan.gradient_accumulation_steps


def needing_less(plan: Plan) -> list[str]:
    """What can be changed about the plan so that a worker needs less memory, the least costly first."""
    advice = []
    if plan.batch_size > 1:
        advice.append(f"lower batch_size (it is {plan.batch_size}) and raise gradient_accumulation_steps")
    advice.append("lower max_seq_len")
    if not plan.enable_activation_checkpointing:
        advice.append("set enable_activation_checkpointing")
    if plan.lora is None:
        advice.append("train with LoRA")
    elif plan.method == "lora":
        advice.append("set quantize_base")
    if plan.method != "qlora":
        advice.append("use more workers")
    return advice


def _component(part: tuple[str, dict[str, Any]] | None) -> ComponentSpec | None:
    return None if part is None else ComponentSpec(component=part[0], kwargs=part[1])


def _contradictions(
    values: dict[str, Any], lora: dict[str, Any], merged: Merged, *, has_validation_data: bool
) -> list[Problem]:
    """Settings that are fine by themselves and wrong together."""
    problems = []
    if values.get("packed") and values.get("max_seq_len") is None:
        problems.append(Problem(merged.param("packed"), "needs max_seq_len too: the length of a pack, in tokens"))
    if values.get("group_by_length") and (values.get("packed") or values.get("shuffle") is False):
        reason = "packs are of one length" if values.get("packed") else "without shuffle the rows keep their order"
        problems.append(Problem(merged.param("group_by_length"), f"has no effect here: {reason}"))
    for key, reason in (
        ("run_val_every_n_steps", "there is nothing to evaluate"),
        ("early_stopping_patience", "nothing tells when to stop"),
    ):
        if values.get(key) and not has_validation_data:
            problems.append(Problem(merged.param(key), f"needs validation_data: without it {reason}"))
    if {"attn_modules", "mlp", "output"} <= lora.keys() and not (lora["attn_modules"] or lora["mlp"] or lora["output"]):
        problems.append(
            Problem(merged.param("lora_attn_modules"), "no layer gets an adapter: there is nothing to train")
        )
    return problems


def _method_contradictions(
    kind: str, values: dict[str, Any], components: dict[str, Any], merged: Merged
) -> list[Problem]:
    """Methods that can't be combined, and settings that a method has no use for."""
    problems = []
    if kind == "lora" and components["quantizer"]:
        message = (
            "works with full fine-tuning only: under an adapter, torchtune's layers for quantisation-aware training "
            "don't run with the torchao that is installed"
        )
        problems.append(Problem(merged.param("quantizer"), message))
    if not values.get("quantize_base"):
        return problems
    if values.get("use_dora"):
        message = "can't be combined with use_dora, which reads the whole frozen layer in every step: choose one"
        problems.append(Problem(merged.param("quantize_base"), message))
    for key in ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload"):
        if values.get(key):
            message = "can't be combined with quantize_base: a 4-bit model isn't sharded, each worker holds all of it"
            problems.append(Problem(merged.param(key), message))
    return problems


def _sharding_contradictions(
    kind: str, values: dict[str, Any], components: dict[str, Any], merged: Merged
) -> list[Problem]:
    """What can't be split over the workers, of which there are several."""
    name, _ = components["optimizer"] or (DEFAULTS["optimizer"], {})
    if shardable(name):
        return []
    if kind == "full":
        message = f"{name} keeps a state that isn't sharded: full fine-tuning with it runs on one worker"
        return [Problem(merged.param("optimizer"), message)]
    message = f"can't be combined with {name}, whose state isn't sharded"
    keys = ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload")
    return [Problem(merged.param(key), message) for key in keys if values.get(key)]


def _logger_problems(config: Config) -> list[Problem]:
    logger = config.logger
    if isinstance(logger, WandBLogger):
        if re.search(r"[/\\#?%:\x00-\x1f]", logger.project):
            return [Problem("logger.project", "W&B project names may not contain / \\ # ? % : or control characters")]
        return []
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", logger.filename, re.ASCII):
        message = "must be a plain file name: letters, digits, '.', '_' and '-', not starting with '.' or '-'"
        return [Problem("logger.filename", message)]
    if logger.filename.lower() in RESERVED_NAMES:
        return [Problem("logger.filename", f"'{logger.filename}' is a name the service itself uses: choose another")]
    return []


def _logger(config: Config) -> DiskLog | WandBLog:
    if isinstance(config.logger, WandBLogger):
        return WandBLog(**config.logger.model_dump(exclude={"log_type"}))
    return DiskLog(filename=config.logger.filename)

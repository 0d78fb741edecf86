"""The plan of a training run: a Config whose settings are merged, typed and checked.

`make_plan` merges the request's options, the `key=value` part of `overrides`, and `extras` (later ones win), and
reports everything that is wrong at once. A `Plan` is plain data; the workers get it as a dict.
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
"""Cache of compiled code in a job's directory."""
REFERENCE = "reference.safetensors"
"""Log-probabilities of the initial model, for DPO, in a job's directory."""
RESERVED_NAMES = frozenset(
    {"data", "checkpoints", COMPILED, REFERENCE, "log.ndjson", "log.index", ERROR_FILE, "wandb", "ray"}
)
"""Names in a job's directory that the service itself uses."""


MethodName = Literal["full", "lora", "dora", "qlora", "qat"]
"""The fine-tuning methods: `full` and `qat` train every weight, the others adapters. (`finetuning_type` in a request
tells these two kinds apart; extras choose between the methods of one kind.)"""


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
    """A component of the allow-list with the user's arguments; the recipe adds the computed ones."""

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
        """Whether each weight is updated as soon as the backward pass has computed its gradient, so that all gradients
        are never in memory at once. This needs a gradient that is complete by then and that nothing else uses: one
        worker, no accumulation, no clipping. For adapters it isn't worth it, nor with bitsandbytes, which synchronises
        the device at each update."""
        return (
            self.lora is None
            and self.workers == 1
            and self.gradient_accumulation_steps == 1
            and self.clip_grad_norm is None
            and not self.optimizer.component.startswith("bitsandbytes.")
        )

    @property
    def fused_adam(self) -> bool:
        """Whether the optimizer is the fused version of torch's Adam or AdamW: it is unless the plan sets `foreach`, or
        sets `fused` to false."""
        kwargs = self.optimizer.kwargs
        other = kwargs.get("foreach") is not None or kwargs.get("fused") is False
        return self.optimizer.component in ("torch.optim.Adam", "torch.optim.AdamW") and not other

    @property
    def pairs(self) -> bool:
        """Whether the data are preferences (DPO): each row is a pair of dialogs."""
        return self.loss.component == DPO_LOSS


DEFAULT_LR = {"full": 4e-5, "lora": 6e-4}
"""Twice torchtune's 2e-5 and 3e-4, which are for half as many rows: see docs/decisions/0022."""
DEFAULT_DPO_LR = {"full": 1e-6, "lora": 1e-5}
"""1e-6 is the default of TRL's DPOConfig; TRL's examples use ten times as much for adapters."""
DEFAULT_ROWS, DEFAULT_GROUPS = 8, 4
"""Default batch sizes: in rows, and in packs or pairs (of two rows each)."""
_LORA_FIELDS = {
    "lora_attn_modules": "attn_modules",
    "apply_lora_to_mlp": "mlp",
    "apply_lora_to_output": "output",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
}


def plan_of(job: FineTuningJob) -> Plan:
    """The plan of `job`. Raises ConfigProblems or ValueError if the job was submitted to another version of Tunewright
    and this one doesn't accept its config."""
    return make_plan(Config.model_validate(job.input_config), job.defaults)


def make_plan(config: Config, defaults: Defaults | None = None) -> Plan:
    """The training run that `config` asks for. `defaults`, as recorded when a job was submitted, replace the present
    default batch size and learning rate. Raises ConfigProblems with everything that is wrong with `config`."""
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
    """Rows, pairs or packs in an optimizer step, over all workers."""
    return plan.batch_size * plan.workers * plan.gradient_accumulation_steps


def needing_less(plan: Plan) -> list[str]:
    """Changes to the plan that save memory on a worker, the least costly first, as advice for the user."""
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
    if plan.method != "qlora" and shardable(plan.optimizer.component):
        advice.append("use more workers")
    return advice


def _component(part: tuple[str, dict[str, Any]] | None) -> ComponentSpec | None:
    return None if part is None else ComponentSpec(component=part[0], kwargs=part[1])


def _contradictions(
    values: dict[str, Any], lora: dict[str, Any], merged: Merged, *, has_validation_data: bool
) -> list[Problem]:
    """Problems of settings that are valid by themselves but not together."""
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
    """Problems of methods that can't be combined, and of settings that a method can't use."""
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
    """Problems of an optimizer whose state can't be sharded. Only for more than one worker."""
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

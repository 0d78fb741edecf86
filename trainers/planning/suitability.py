"""Checks whether a plan works with its model. Needs only the model's config.json."""

from trainers.errors import UserError
from trainers.models.architecture import Architecture
from trainers.models.layout import linears
from trainers.planning.plan import EXTRAS, Plan

NF4_BLOCK = 64 * 256
"""Weights per block of NF4: 256 scales, of 64 weights each, share one scale. torchao quantises whole blocks only."""
DEFAULT_GROUPSIZE = 256
"""torchao's default for QAT."""
MAX_SEQ_LEN = 4096
"""Longest row, in tokens, if the user doesn't set max_seq_len and the model would take more."""
_CUSTOM = "fine_tuning_options.custom_training_options"


def longest_row(plan: Plan, arch: Architecture) -> int:
    """The number of tokens after which rows are cut off."""
    return min(plan.max_seq_len or MAX_SEQ_LEN, arch.max_seq_len)


def check_suitable(plan: Plan, arch: Architecture) -> None:
    """Raises UserError `unsupported_for_model`, which names the setting, if the plan can't be used with this model."""
    if plan.lora is not None and plan.lora.output and arch.tied:
        raise _unsuitable(
            f"{_CUSTOM}.apply_lora_to_output",
            "apply_lora_to_output can't be used with this model: its output head is tied to its embedding "
            "(tie_word_embeddings), so there is no separate layer to adapt.",
            "leave it out",
        )
    if plan.method == "qlora":
        _check_nf4(arch)
    if plan.method == "qat":
        _check_groups(plan, arch)


def _check_nf4(arch: Architecture) -> None:
    for linear in linears(arch):
        for part in linear.parts:
            if part.name != "output" and part.rows * linear.columns % NF4_BLOCK:
                raise _unsuitable(
                    f"{EXTRAS}.quantize_base",
                    f"quantize_base can't be used with this model: NF4 works on blocks of {NF4_BLOCK:,} numbers, and "
                    f"the layer {part.name} ({part.rows} x {linear.columns}) is not a multiple of that.",
                    "train it with plain LoRA",
                )


def _check_groups(plan: Plan, arch: Architecture) -> None:
    size = plan.quantizer.kwargs.get("groupsize", DEFAULT_GROUPSIZE) if plan.quantizer else DEFAULT_GROUPSIZE
    for linear in linears(arch):
        if linear.columns % size:
            raise _unsuitable(
                f"{EXTRAS}.quantizer.groupsize",
                f"groupsize {size} can't be used with this model: the layer {linear.parts[0].name} has "
                f"{linear.columns} inputs, which is not a multiple of it.",
                "choose one that divides the inputs of every layer",
            )


def _unsuitable(param: str, message: str, suggestion: str) -> UserError:
    return UserError("unsupported_for_model", message, param=param, suggestion=suggestion)

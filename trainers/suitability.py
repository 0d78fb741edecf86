"""Whether a plan can be carried out on the model it names: known as soon as the model's config.json is read."""

from trainers.errors import UserError
from trainers.models.architecture import Architecture
from trainers.plan import Plan

_CUSTOM = "fine_tuning_options.custom_training_options"


def check_suitable(plan: Plan, arch: Architecture) -> None:
    """Raises UserError `unsupported_for_model` naming the setting that this model has no use for."""
    if plan.lora is not None and plan.lora.output and arch.tied:
        raise UserError(
            "unsupported_for_model",
            "apply_lora_to_output can't be used with this model: its output head is tied to its embedding "
            "(tie_word_embeddings), so there is no separate layer to adapt.",
            param=f"{_CUSTOM}.apply_lora_to_output",
        )

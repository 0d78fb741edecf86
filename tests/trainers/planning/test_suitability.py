"""A plan that can't be used with its model is refused before anything is trained."""

from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_model
from tests.trainers.recipe_support import QUANTIZER, make_plan_for
from trainers.errors import UserError
from trainers.models.architecture import inspect_model_dir
from trainers.planning.plan import LoraSpec
from trainers.planning.suitability import check_suitable


def test_an_adapter_on_a_tied_head_is_refused_by_name(tmp_path: Path) -> None:
    arch = inspect_model_dir(make_tiny_model(tmp_path, "llama"))
    with pytest.raises(UserError, match="apply_lora_to_output") as caught:
        check_suitable(make_plan_for(lora=LoraSpec(output=True)), arch)
    assert caught.value.error.param == "fine_tuning_options.custom_training_options.apply_lora_to_output"


def test_an_adapter_on_an_untied_head_is_fine(tmp_path: Path) -> None:
    check_suitable(make_plan_for(lora=LoraSpec(output=True)), inspect_model_dir(make_tiny_model(tmp_path, "mistral")))


def test_a_layer_that_is_not_a_multiple_of_nf4s_blocks_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    """With the widths of SmolLM2-135M."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    arch = inspect_model_dir(make_tiny_model(tmp_path, "llama", **sizes))
    with pytest.raises(UserError, match=r"layers\.0\.attn\.q_proj \(576 x 576\)") as caught:
        check_suitable(make_plan_for("qlora"), arch)
    assert caught.value.error.param == "fine_tuning_options.extras.quantize_base"


def test_whole_nf4_blocks_are_fine_whatever_the_head_is(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "vocab_size": 513}
    check_suitable(make_plan_for("qlora"), inspect_model_dir(make_tiny_model(tmp_path, "mistral", **sizes)))


def test_a_groupsize_that_does_not_divide_a_layers_inputs_is_refused_by_name(tmp_path: Path) -> None:
    arch = inspect_model_dir(make_tiny_model(tmp_path, "llama", intermediate_size=144))
    with pytest.raises(UserError, match=r"groupsize 32 .* layers\.0\.mlp\.w2 has 144 inputs") as caught:
        check_suitable(make_plan_for("qat"), arch)
    assert caught.value.error.param == "fine_tuning_options.extras.quantizer.groupsize"
    check_suitable(make_plan_for("qat", quantizer=QUANTIZER.model_copy(update={"kwargs": {"groupsize": 16}})), arch)

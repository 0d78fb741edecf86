"""Adapters: the PEFT layout and merging. That peft reads them as we do is tested in test_model_parity.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_models import make_tiny_model
from tests.trainers.models.conftest import BuildModel
from trainers.errors import UserError
from trainers.methods.lora import adapter_parameters, lora_linear
from trainers.models.adapters import load_peft_adapter, merge_lora, save_peft_adapter
from trainers.models.architecture import Architecture, inspect_model_dir
from trainers.models.decoder import build_decoder
from trainers.models.weights import load_weights
from trainers.planning.plan import LoraSpec


def random_adapter(arch: Architecture, lora: LoraSpec) -> dict[str, Tensor]:
    with torch.device("meta"):
        parameters = adapter_parameters(build_decoder(arch, linear=lora_linear(lora)))
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


@pytest.mark.parametrize("modules", [("q_proj", "k_proj", "v_proj", "output_proj"), ("q_proj", "v_proj")])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_adapter_comes_back_to_the_bit(family: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    lora = LoraSpec(attn_modules=modules, mlp=True, output=family == "phi3", rank=4)
    arch = inspect_model_dir(make_tiny_model(tmp_path / "base", family))
    adapter = random_adapter(arch, lora)
    save_peft_adapter(adapter, arch, lora, "base", tmp_path / "adapter")
    again = load_peft_adapter(tmp_path / "adapter", arch, lora)
    assert again.keys() == adapter.keys()
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)


def test_an_adapter_names_its_base_and_its_layers(tmp_path: Path) -> None:
    lora = LoraSpec(attn_modules=("q_proj", "output_proj"), rank=4, alpha=32)
    arch = inspect_model_dir(make_tiny_model(tmp_path / "base"))
    save_peft_adapter(random_adapter(arch, lora), arch, lora, "acme/base", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("acme/base", 4, 32)
    assert config["target_modules"] == ["o_proj", "q_proj"]
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight" in names


def test_fused_layers_get_one_adapter_of_the_summed_rank(tmp_path: Path) -> None:
    lora = LoraSpec(rank=4, alpha=8)
    arch = inspect_model_dir(make_tiny_model(tmp_path / "base", "phi3"))
    save_peft_adapter(random_adapter(arch, lora), arch, lora, "base", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"qkv_proj": 12}, {"qkv_proj": 24})


def test_merged_weights_compute_what_base_and_adapter_compute(tmp_path: Path, build_model: BuildModel) -> None:
    lora = LoraSpec(mlp=True, output=True, rank=4, alpha=32)
    arch = inspect_model_dir(make_tiny_model(tmp_path, "qwen2", tie_word_embeddings=False))
    adapter = random_adapter(arch, lora)
    base = load_weights(tmp_path, arch)
    merged = build_model(tmp_path)
    merged.load_state_dict(merge_lora(base, adapter, lora))
    tokens = torch.arange(32)[None]
    expected = build_model(tmp_path, lora=lora, adapter=adapter)(tokens)
    assert (expected - build_model(tmp_path)(tokens)).abs().max() > 0.1
    torch.testing.assert_close(merged(tokens), expected, rtol=0, atol=1e-4)


def test_merging_leaves_the_base_alone_and_rounds_once(tmp_path: Path) -> None:
    lora = LoraSpec(rank=2, alpha=2)
    arch = inspect_model_dir(make_tiny_model(tmp_path))
    base = load_weights(tmp_path, arch, torch.bfloat16)
    before = {name: value.clone() for name, value in base.items()}
    adapter = random_adapter(arch, lora)
    merged = merge_lora(base, adapter, lora)
    layer = "layers.0.attn.q_proj"
    delta = adapter[f"{layer}.lora_b.weight"] @ adapter[f"{layer}.lora_a.weight"]
    assert torch.equal(merged[f"{layer}.weight"], (base[f"{layer}.weight"].float() + delta).bfloat16())
    assert all(torch.equal(base[name], value) for name, value in before.items())
    assert merged["layers.0.mlp.w1.weight"] is base["layers.0.mlp.w1.weight"]


@pytest.mark.parametrize("other", [LoraSpec(rank=8), LoraSpec(alpha=1, rank=4), LoraSpec(rank=4, mlp=True)])
def test_an_adapter_of_another_shape_is_refused(other: LoraSpec, tmp_path: Path) -> None:
    lora = LoraSpec(rank=4)
    arch = inspect_model_dir(make_tiny_model(tmp_path / "base"))
    save_peft_adapter(random_adapter(arch, lora), arch, lora, "base", tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter"):
        load_peft_adapter(tmp_path / "adapter", arch, other)


def test_a_directory_without_an_adapter_is_named(tmp_path: Path) -> None:
    arch = inspect_model_dir(make_tiny_model(tmp_path))
    with pytest.raises(UserError, match="can't be read"):
        load_peft_adapter(tmp_path, arch, LoraSpec())


def test_an_adapter_whose_file_was_cut_short_is_incomplete(tmp_path: Path) -> None:
    arch = inspect_model_dir(make_tiny_model(tmp_path / "base"))
    save_peft_adapter({}, arch, LoraSpec(), "base", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="can't be read") as caught:
        load_peft_adapter(tmp_path / "adapter", arch, LoraSpec())
    assert caught.value.error.code == "model_incomplete"

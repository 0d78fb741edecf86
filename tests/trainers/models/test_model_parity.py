"""Our decoder against transformers, our adapters against peft: the same directories, the same logits.

Everything is prepared first and then run by one process of the other environment, as importing transformers is slow.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tests.hf_environment import run_in_hf_environment
from tests.tiny_models import FAMILIES, make_tiny_model
from tests.trainers.models.conftest import BuildModel
from trainers.methods.dora import dora_linear
from trainers.methods.lora import adapter_parameters, lora_linear
from trainers.models.adapters import MAGNITUDE, load_peft_adapter, merge_lora, save_peft_adapter, untouched_magnitudes
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder, init_rope
from trainers.models.generate import generate
from trainers.models.weights import load_weights, save_hf_model
from trainers.planning.plan import LoraSpec

pytestmark = pytest.mark.timeout(600)  # dozens of models go through transformers in one go
TOKENS = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(0))
ANSWER = 16
"""Tokens to generate."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied-biases-wide-heads": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama-rope-llama3": ("llama", {"rope_scaling": LLAMA3_ROPE}),
    "llama-rope-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-rope-of-transformers-5": (
        "llama",
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "mistral-sliding-window": ("mistral", {"sliding_window": 16, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-windows-in-later-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-untied-biases": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma": ("gemma", {}),
    "gemma-legacy-gelu": ("gemma", {"hidden_act": "gelu", "num_key_value_heads": 4}),
    "gemma2": ("gemma2", {}),
    "gemma2-uncapped-three-layers": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "num_hidden_layers": 3},
    ),
    "gemma3": ("gemma3_text", {}),
    "gemma3-of-transformers-5": (
        "gemma3_text",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_theta": None,
            "rope_scaling": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            },
        },
    ),
    "gemma3-seven-layers-final-softcap": (
        "gemma3_text",
        {"num_hidden_layers": 7, "sliding_window_pattern": 6, "final_logit_softcapping": 2.0},
    ),
    "phi3": ("phi3", {}),
    "phi3-sliding-window": ("phi3", {"sliding_window": 16}),
    "phi3-grouped-longrope": (
        "phi3",
        {"num_key_value_heads": 2, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
    ),
}


def lora_of(name: str, *, tied: bool) -> LoraSpec:
    """Adapters everywhere, except for one model of fused projections that adapts only some of their parts."""
    modules = ("q_proj", "v_proj") if name == "phi3-grouped-longrope" else LoraSpec().attn_modules
    return LoraSpec(attn_modules=modules, mlp=True, output=not tied, rank=4, alpha=8)


@dataclass
class Bench:
    """Model directories by case, and what each side computes on them."""

    folder: Path
    cases: list[dict[str, Any]]
    ours: dict[str, Tensor]
    answers: dict[str, list[int]]

    def add(self, name: str, ours: Tensor, **case: Any) -> None:
        self.ours[name] = ours
        self.cases.append({"tokens": TOKENS.tolist(), "out": str(self.folder / f"{name}.out")} | case)

    def theirs(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.out")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, build_model: BuildModel, smollm2_dir: Path) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("parity"), [], {}, {})
    with torch.no_grad():
        for name, (family, config) in MODELS.items():
            add_tiny(bench, build_model, name, family, config)
            add_dora(bench, name)
        add_smollm2(bench, build_model, smollm2_dir)
    cases = bench.folder / "cases.json"
    cases.write_text(json.dumps(bench.cases))
    run_in_hf_environment("run_models.py", str(cases))
    return bench


def add_tiny(bench: Bench, build_model: BuildModel, name: str, family: str, config: dict[str, Any]) -> None:
    source = make_tiny_model(bench.folder / name, family, **config)
    arch = inspect_model_dir(source)
    base = load_weights(source, arch)
    model = build_model(source)
    answer = generate(model, TOKENS[:1].tolist(), max_new_tokens=ANSWER, eos_ids={2}, pad_id=0)[0]
    bench.answers[name] = answer
    bench.add(name, model(TOKENS), model=str(source), generate=ANSWER)

    lora = lora_of(name, tied=arch.tied)
    with torch.device("meta"):
        parameters = adapter_parameters(build_decoder(arch, linear=lora_linear(lora)))
    generator = torch.Generator().manual_seed(1)
    adapter = {key: 0.1 * torch.randn(p.shape, generator=generator) for key, p in parameters.items()}
    ours = build_model(source, lora=lora, adapter=adapter)(TOKENS)
    save_peft_adapter(adapter, arch, lora, str(source), bench.folder / f"{name}-adapter")
    bench.add(f"{name}-adapter", ours, model=str(source), adapter=str(bench.folder / f"{name}-adapter"))

    merged = bench.folder / f"{name}-merged"
    save_hf_model(merge_lora(base, adapter, lora), arch, source, merged, max_shard_bytes=100_000)
    bench.add(f"{name}-merged", ours, model=str(merged))


def add_dora(bench: Bench, name: str) -> None:
    """The adapter of `name` with magnitudes of its own, on the model directory of `name`."""
    source = bench.folder / name
    arch = inspect_model_dir(source)
    base = load_weights(source, arch)
    lora = lora_of(name, tied=arch.tied)
    with torch.device("meta"):
        decoder = build_decoder(arch, linear=partial(dora_linear, lora))
    generator = torch.Generator().manual_seed(2)
    adapter = {
        key: (1.0 if key.endswith(MAGNITUDE) else 0.1) * torch.rand(p.shape, generator=generator)
        for key, p in decoder.named_parameters()
        if key not in base
    }
    decoder.load_state_dict(base | adapter, assign=True)
    init_rope(decoder, "cpu")
    ours = decoder.eval()(TOKENS)
    directory, merged = (bench.folder / f"{name}-dora-{kind}" for kind in ("adapter", "merged"))
    save_peft_adapter(adapter | untouched_magnitudes(base, adapter, arch), arch, lora, str(source), directory)
    bench.add(f"{name}-dora-adapter", ours, model=str(source), adapter=str(directory))
    save_hf_model(merge_lora(base, adapter, lora), arch, source, merged)
    bench.add(f"{name}-dora-merged", ours, model=str(merged))
    loaded = load_peft_adapter(directory, arch, lora)
    assert loaded.keys() == adapter.keys()
    assert all(torch.equal(loaded[key], adapter[key]) for key in adapter)


def add_smollm2(bench: Bench, build_model: BuildModel, smollm2_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    prompt = tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n").ids
    model = build_model(smollm2_dir)
    answer = generate(model, [prompt], max_new_tokens=16, eos_ids={2}, pad_id=2)[0]
    bench.answers["smollm2"] = answer
    bench.add("smollm2", model(torch.tensor([prompt])), model=str(smollm2_dir), tokens=[prompt], generate=16)


def test_every_family_is_compared() -> None:
    assert {family for family, _ in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, bench: Bench) -> None:
    torch.testing.assert_close(bench.ours[name], bench.theirs(name)["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_our_adapter_and_computes_the_same(name: str, bench: Bench) -> None:
    theirs = bench.theirs(f"{name}-adapter")["logits"]
    assert (theirs - bench.ours[name]).abs().max() > 0.1, "the adapter has no effect"
    torch.testing.assert_close(bench.ours[f"{name}-adapter"], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_our_sharded_merged_export_and_computes_the_same(name: str, bench: Bench) -> None:
    """Merging changes the order of additions, hence the wider tolerance."""
    theirs = bench.theirs(f"{name}-merged")["logits"]
    torch.testing.assert_close(bench.ours[f"{name}-merged"], theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_dora_comes_out_the_same_under_peft_and_merged_under_transformers(name: str, kind: str, bench: Bench) -> None:
    theirs = bench.theirs(f"{name}-dora-{kind}")["logits"]
    assert (theirs - bench.ours[name]).abs().max() > 0.1, "the adapter has no effect"
    torch.testing.assert_close(bench.ours[f"{name}-dora-{kind}"], theirs, rtol=0, atol=1e-4)


def test_the_demo_model_has_the_logits_of_transformers(bench: Bench) -> None:
    torch.testing.assert_close(bench.ours["smollm2"], bench.theirs("smollm2")["logits"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", [*MODELS, "smollm2"])
def test_greedy_answers_are_those_of_transformers(name: str, bench: Bench) -> None:
    """Prompts of the tiny models are longer than their windows."""
    answer = bench.answers[name]
    assert answer
    assert bench.theirs(name)["generated"].tolist()[: len(answer)] == answer

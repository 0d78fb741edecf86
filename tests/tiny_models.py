"""Tiny random models in Hugging Face layout: about 100k parameters, a real tokenizer, made in milliseconds.

Tests use them wherever they need a model directory. Nothing here imports torch, transformers or this project, so that a
mistake of ours can't hide in the fixture.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "rope_theta": 10000.0},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "sliding_window": None,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "head_dim": 32,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "gemma": {
        "architectures": ["GemmaForCausalLM"],
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "head_dim": 32,
        "num_key_value_heads": 1,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 16,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 512,
        "sliding_window": None,
    },
}
FAMILIES = tuple(_FAMILIES)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog while the children read a short story about the sea.",
    "What is the capital of France? The capital of France is Paris. What is the answer to this question?",
    "You are a helpful assistant. Please write the number of apples that are left, and nothing else.",
    "If there are seven birds in the tree and three of them fly away, how many birds remain there?",
    "Translate this sentence into another language, then explain the reason for each word you chose.",
    "The system sends a message to the user and the user answers; the assistant thinks before it speaks.",
    "Some people like to train large models on many machines, other people like small models on one machine.",
    '{"name": "get_weather", "arguments": {"city": "Berlin", "unit": "celsius"}} [1, 2, 3, 4] def main(): return 0',
)


def make_tiny_model(path: Path, family: str = "llama", seed: int = 0, **config: Any) -> Path:
    """Writes config.json, model.safetensors (fp32), tokenizer and generation config under `path`; returns `path`.

    `family` is one of FAMILIES. `config` overrides or adds keys of config.json (the weights
    follow: sizes, tie_word_embeddings, attention_bias, mlp_bias). Ids: 0 `<|endoftext|>` (also padding), 1
    `<|im_start|>`, 2 `<|im_end|>` (ends generation). The same arguments always give the same bytes.
    """
    path.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": family} | _COMMON | _FAMILIES[family] | config
    _write_json(path / "config.json", settings)
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    _write_json(path / "tokenizer_config.json", _tokenizer_config(settings))
    (path / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    save_file(_weights(settings, seed), path / "model.safetensors", metadata={"format": "pt"})
    return path


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tokenizer_config(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": settings["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return str(tokenizer.to_str(pretty=True))


def _weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: _tensor(config, name, shape, rng) for name, shape in _shapes(config)}


def _tensor(config: dict[str, Any], name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random, for norms and biases, too, so that a tensor that is dropped or swapped changes the logits."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return 0.1 * noise + (0 if config["model_type"].startswith("gemma") else 1)
    if len(shape) == 1:
        return 0.1 * noise
    return noise * np.float32(0.05 if "embed" in name else shape[1] ** -0.5)


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint, as the family's modelling file in transformers registers them."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, width)
    for index in range(config["num_hidden_layers"]):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{index}.{name}", shape
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, width)


def _layer_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    fused = config["model_type"] == "phi3"
    attention_bias = config.get("attention_bias", False)
    qkv_bias = attention_bias or config["model_type"] == "qwen2"
    linears = (
        [("self_attn.qkv_proj", q + 2 * kv, width, False)]
        if fused
        else [
            ("self_attn.q_proj", q, width, qkv_bias),
            ("self_attn.k_proj", kv, width, qkv_bias),
            ("self_attn.v_proj", kv, width, qkv_bias),
        ]
    )
    linears.append(("self_attn.o_proj", width, q, attention_bias))
    mlp_bias = config.get("mlp_bias", False)
    linears += (
        [("mlp.gate_up_proj", 2 * ffn, width, False)]
        if fused
        else [
            ("mlp.gate_proj", ffn, width, mlp_bias),
            ("mlp.up_proj", ffn, width, mlp_bias),
        ]
    )
    linears.append(("mlp.down_proj", width, ffn, mlp_bias))
    for name, rows, columns, bias in linears:
        yield f"{name}.weight", (rows, columns)
        if bias:
            yield f"{name}.bias", (rows,)
    if config["model_type"] in ("qwen3", "gemma3_text"):
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)
    yield "input_layernorm.weight", (width,)
    yield "post_attention_layernorm.weight", (width,)
    if config["model_type"] in ("gemma2", "gemma3_text"):
        yield "pre_feedforward_layernorm.weight", (width,)
        yield "post_feedforward_layernorm.weight", (width,)

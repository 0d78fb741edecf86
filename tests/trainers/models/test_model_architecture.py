"""Reading config.json: what can be built is read exactly, everything else is refused by name."""

import json
import math
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import FAMILIES, make_tiny_model
from trainers.errors import UserError
from trainers.models import architecture
from trainers.models.architecture import inspect_model_dir, read_architecture

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 225,
    "attn_logit_softcapping": 40.0,
    "final_logit_softcapping": 20.0,
    "sliding_window": 4096,
}
GEMMA3: dict[str, Any] = {
    **{key: value for key, value in GEMMA2.items() if "softcap" not in key and key != "hidden_act"},
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "max_position_embeddings": 32768,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
PHI3: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if not key.startswith(("rope", "num_key"))},
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
}


def refusal(config: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        read_architecture(config)
    assert caught.value.error.param == "model"
    return caught.value


def test_a_llama_config_is_read_completely() -> None:
    arch = read_architecture(LLAMA)
    assert (arch.family, arch.num_layers, arch.num_kv_heads, arch.head_dim) == ("llama", 16, 8, 64)
    assert (arch.tied, arch.qkv_bias, arch.mlp_bias, arch.activation) == (True, False, False, "silu")
    assert (arch.rope.kind, arch.rope.theta, arch.rope.factor) == ("llama3", 500000.0, 32.0)
    assert (arch.max_seq_len, arch.norm_eps) == (131072, 1e-5)
    assert arch.json is LLAMA


def test_the_rope_spelling_of_transformers_5_means_the_same() -> None:
    scaling = LLAMA["rope_scaling"] | {"rope_theta": 500000.0}
    newer = {key: value for key, value in LLAMA.items() if not key.startswith("rope")} | {"rope_parameters": scaling}
    assert read_architecture(newer).rope == read_architecture(LLAMA).rope


def test_what_a_config_leaves_out_is_what_transformers_assumes() -> None:
    sparse = {key: LLAMA[key] for key in LLAMA if not key.startswith(("rope", "num_key", "tie", "rms"))}
    arch = read_architecture(sparse)
    assert (arch.num_kv_heads, arch.tied, arch.norm_eps, arch.rope.theta) == (32, False, 1e-6, 10000.0)
    gemma = read_architecture(sparse | {"model_type": "gemma", "architectures": None, "num_key_value_heads": 1})
    assert (gemma.tied, gemma.head_dim, gemma.activation) == (True, 256, "gelu_tanh")


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_is_in_force_in_every_layer_and_limits_no_length(family: str) -> None:
    config = LLAMA | {"model_type": family, "architectures": None, "rope_scaling": None, "sliding_window": 4096}
    arch = read_architecture(config)
    assert (arch.windows, arch.max_seq_len) == ((4096,) * 16, 131072)
    assert read_architecture(config | {"sliding_window": None}).windows == (None,) * 16


def test_a_window_that_is_not_named_is_the_one_transformers_assumes() -> None:
    plain = LLAMA | {"architectures": None, "rope_scaling": None}
    windows = {name: read_architecture(plain | {"model_type": name}).windows[0] for name in FAMILIES}
    assert windows == dict.fromkeys(FAMILIES) | dict.fromkeys(("mistral", "gemma2", "gemma3_text"), 4096)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_uses_its_window_only_when_told_to(family: str) -> None:
    config = LLAMA | {"model_type": family, "architectures": None, "rope_scaling": None, "sliding_window": 4096}
    assert read_architecture(config).windows == (None,) * 16
    told = config | {"use_sliding_window": True, "max_window_layers": 12}
    assert read_architecture(told).windows == (None,) * 12 + (4096,) * 4
    assert read_architecture(told | {"max_window_layers": 0}).windows == (4096,) * 16
    kinds = ["sliding_attention", "full_attention"] * 8
    assert read_architecture(told | {"layer_types": kinds}).windows == (4096, None) * 8


def test_qwen2_has_biases_in_front_and_qwen3_where_its_config_says_so() -> None:
    config = LLAMA | {"architectures": None, "rope_scaling": None}
    qwen2, qwen3 = (read_architecture(config | {"model_type": name}) for name in ("qwen2", "qwen3"))
    assert (qwen2.qkv_bias, qwen2.attention_output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.head_dim, qwen3.qk_norm) == (False, 128, True)
    assert read_architecture(config | {"model_type": "qwen3", "attention_bias": True}).attention_output_bias


def test_gemma_2_is_read_completely() -> None:
    arch = read_architecture(GEMMA2)
    assert arch.windows == (4096, None) * 13
    assert arch.attention_scale == pytest.approx(1 / 15)
    assert (arch.attention_softcap, arch.final_softcap) == (40.0, 20.0)
    assert (arch.gemma_style, arch.post_norms, arch.qk_norm, arch.activation) == (True, True, False, "gelu_tanh")
    silent = read_architecture({key: value for key, value in GEMMA2.items() if "softcap" not in key})
    assert (silent.attention_softcap, silent.final_softcap) == (50.0, 30.0)


def test_gemma_3_is_read_completely() -> None:
    arch = read_architecture(GEMMA3)
    assert arch.windows == ((512,) * 5 + (None,)) * 4 + (512,) * 2
    assert (arch.rope.kind, arch.rope.theta, arch.rope.factor) == ("linear", 1_000_000.0, 8.0)
    assert (arch.local_rope.kind, arch.local_rope.theta) == ("default", 10_000.0)
    assert (arch.attention_softcap, arch.final_softcap) == (None, None)
    assert (arch.gemma_style, arch.post_norms, arch.qk_norm) == (True, True, True)


def test_gemma_3_as_transformers_5_spells_it_means_the_same() -> None:
    older = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    newer = {key: value for key, value in GEMMA3.items() if key not in older} | {
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(26)],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }
    old, new = read_architecture(GEMMA3), read_architecture(newer)
    assert replace(new, json={}) == replace(old, json={})


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        ("gemma2", {"sliding_window": None}, "no sliding_window"),
        ("gemma2", {"sliding_window": 0}, "sliding_window"),
        ("gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern 3"),
        ("gemma2", {"layer_types": ["full_attention"]}, "1 layer_types for 26"),
        ("gemma2", {"hidden_activation": "gelu"}, "gelu"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"final_logit_softcapping": "high"}, "final_logit_softcapping"),
        ("gemma2", {"tie_word_embeddings": False}, "final_logit_softcapping without tie_word_embeddings"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
        ("gemma3", {"rope_scaling": None, "rope_parameters": {"rope_theta": 10000.0}}, "full_attention"),
        ("gemma3", {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "gemma3_text"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 16}, "no sliding_window"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        ("qwen3", {"use_sliding_window": "yes"}, "use_sliding_window"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ],
)
def test_what_a_newer_family_would_get_wrong_is_refused_by_name(base: str, change: dict[str, Any], named: str) -> None:
    qwen3 = LLAMA | {"model_type": "qwen3", "architectures": None, "rope_scaling": None}
    error = refusal({"gemma2": GEMMA2, "gemma3": GEMMA3, "qwen3": qwen3}[base] | change)
    assert error.error.code == "model_unsupported"
    assert named in str(error)


def test_longrope_limits_the_sequence_length_to_the_original_context() -> None:
    scaling = {"type": "longrope", "short_factor": [1.1] * 32, "long_factor": [9.0] * 32}
    arch = read_architecture(PHI3 | {"rope_scaling": scaling, "original_max_position_embeddings": 4096})
    assert arch.max_seq_len == 4096
    assert arch.rope.short_factor == (1.1,) * 32
    assert arch.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "None"),
        ({"model_type": ["llama"]}, "llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": "fp8"}, "quantised"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_act": ["silu"]}, "silu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}},
            "high_freq",
        ),
        ({"rope_scaling": [1, 2]}, "rotary"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "between layers"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3}}, "short_factor has 3"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [10**400] * 32}}, "short_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "factor": "x"}}, "factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "attention_factor": [1]}},
            "attention_factor",
        ),
        (
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "original_max_position_embeddings": 8},
                "max_position_embeddings": None,
            },
            "max_position_embeddings",
        ),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"hidden_size": 2047}, "hidden_size 2047"),
        ({"hidden_size": "2048"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"head_dim": 63}, "head_dim 63"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": 7}, "layer_types"),
        ({"architectures": "LlamaModel"}, "LlamaModel"),
    ],
)
def test_what_would_be_silently_wrong_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    error = refusal(LLAMA | change)
    assert error.error.code == "model_unsupported"
    assert named in str(error)


def test_a_refused_family_says_which_ones_are_supported() -> None:
    message = str(refusal(LLAMA | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    assert all(family in message for family in FAMILIES)


def test_every_family_has_a_tiny_model_to_be_tested_with() -> None:
    assert set(FAMILIES) == set(architecture.FAMILIES)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"])
def test_a_missing_key_is_named(key: str) -> None:
    error = refusal({name: value for name, value in LLAMA.items() if name != key})
    assert error.error.code == "model_incomplete"
    assert key in str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_complete_directory_of_each_family_passes_inspection(family: str, tmp_path: Path) -> None:
    assert inspect_model_dir(make_tiny_model(tmp_path, family)).family == family


def broken(model_dir: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        inspect_model_dir(model_dir)
    assert caught.value.error.param == "model"
    return caught.value


@pytest.mark.parametrize(
    ("file", "named"),
    [("config.json", "config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "tokenizer.json")],
)
def test_a_directory_that_lacks_a_file_is_incomplete(file: str, named: str, tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / file).unlink()
    error = broken(tmp_path)
    assert error.error.code == "model_incomplete"
    assert named in str(error)


def test_a_missing_directory_is_not_found(tmp_path: Path) -> None:
    assert broken(tmp_path / "nowhere").error.code == "model_not_found"


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "save_pretrained" in str(broken(tmp_path))


def test_an_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in str(broken(tmp_path))


def test_a_download_that_was_cut_short_is_noticed(tmp_path: Path) -> None:
    weights = make_tiny_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "cut short" in str(broken(tmp_path))


def test_git_lfs_pointers_in_place_of_weights_are_recognised(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    error = broken(tmp_path)
    assert error.error.code == "model_incomplete"
    assert "git lfs pull" in str(error)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": {"data_offsets": []}}',
        b'{"a": {"data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, Infinity]}}',
        b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 1e999]}}',
        b'{"a": {"dtype": "F32", "shape": [], "data_offsets": "04"}}',
        b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [4, 0]}}',
        b"[" * 9999,
    ],
)
def test_a_safetensors_file_with_a_broken_header_is_named(header: bytes, tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    error = broken(tmp_path)
    assert error.error.code == "model_incomplete"
    assert "model.safetensors" in str(error)


def test_a_header_too_large_to_be_parsed_beside_others_is_not_read(tmp_path: Path) -> None:
    with (make_tiny_model(tmp_path) / "model.safetensors").open("wb") as weights:
        weights.write(struct.pack("<Q", 50_000_000) + b'{"__metadata__": {"a": "')
        weights.truncate(50_000_008)
    assert "a header of 50000000 bytes" in str(broken(tmp_path))


def test_a_header_that_lies_about_where_its_tensors_are_is_noticed(tmp_path: Path) -> None:
    weights = make_tiny_model(tmp_path) / "model.safetensors"
    content = weights.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    tensors = json.loads(content[8 : 8 + length])
    embedding = tensors["model.embed_tokens.weight"]

    def rewrite(start: float, end: float) -> None:
        header = json.dumps(
            tensors | {"model.embed_tokens.weight": embedding | {"data_offsets": [start, end]}}
        ).encode()
        weights.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])

    start, end = embedding["data_offsets"]
    rewrite(start, end)
    inspect_model_dir(tmp_path)
    inexact = ((start, float(end)), (float(start), end))
    for lie in ((start + 4, end + 4), (start, end - 4), (start + 4, end), *inexact):
        rewrite(*lie)
        error = broken(tmp_path)
        assert error.error.code == "model_incomplete"
        assert "model.safetensors" in str(error)


def test_a_tensor_that_has_not_the_bytes_of_its_shape_is_noticed(tmp_path: Path) -> None:
    weights = make_tiny_model(tmp_path) / "model.safetensors"
    content = weights.read_bytes()
    assert b'"F32"' in content
    weights.write_bytes(content.replace(b'"F32"', b'"F16"'))
    error = broken(tmp_path)
    assert error.error.code == "model_incomplete"
    assert "bytes" in str(error)


def test_a_config_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    config = make_tiny_model(tmp_path) / "config.json"
    config.unlink()
    os.mkfifo(config)
    assert "config.json" in str(broken(tmp_path))
    config.unlink()
    config.symlink_to("/dev/zero")
    assert "config.json" in str(broken(tmp_path))


def test_a_config_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    config = make_tiny_model(tmp_path) / "config.json"
    os.truncate(config, 10**12)  # it has holes: on disk it is as small as before
    assert "too large" in str(broken(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"not safetensors at all"])
def test_a_file_that_is_no_safetensors_is_named(content: bytes, tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "model.safetensors").write_bytes(content)
    error = broken(tmp_path)
    assert error.error.code == "model_incomplete"
    assert "model.safetensors" in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "\x00", "[" * 9999])
def test_a_config_that_is_no_json_object_is_named(text: str, tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "config.json").write_text(text)
    assert "config.json" in str(broken(tmp_path))


def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path: Path) -> None:
    config = make_tiny_model(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    assert "[128, 64], config.json asks for [96, 64]" in str(broken(tmp_path))


def test_weights_with_a_missing_layer_are_incomplete(tmp_path: Path) -> None:
    config = make_tiny_model(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    assert "model.layers.2." in str(broken(tmp_path))


def test_a_config_with_absurdly_many_layers_costs_nothing(tmp_path: Path) -> None:
    config = make_tiny_model(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 10**12}))
    assert "num_hidden_layers" in str(broken(tmp_path))


def test_weights_with_tensors_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    config = make_tiny_model(tmp_path, attention_bias=True) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_bias": False}))
    error = broken(tmp_path)
    assert error.error.code == "model_unsupported"
    assert "q_proj.bias" in str(error)


def test_an_index_that_names_a_missing_shard_is_incomplete(tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in str(broken(tmp_path))


def test_an_index_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "other")
    (make_tiny_model(tmp_path / "model") / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no safetensors beside it" in str(broken(tmp_path / "model"))

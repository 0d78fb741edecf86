"""What a Hugging Face `config.json` says about a model, as far as building and training it needs.

Reading is strict: whatever would change the model's outputs and is not built here is refused by name, because a model
that trains slightly wrong is worse than one that doesn't train.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainers.errors import UserError
from trainers.models.model_files import check_weights, incomplete, read_json_object
from trainers.models.rope_config import RopeParams, read_rope

FamilyName = Literal["llama", "mistral", "qwen2", "gemma", "phi3"]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer, described completely. Sizes are counts of elements; `max_seq_len` is in tokens."""

    family: FamilyName
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_seq_len: int
    """Longest sequence whose outputs are exact: within the sliding window and the original context of a long RoPE."""
    tied: bool
    """The output head is the embedding matrix; checkpoints hold no `lm_head.weight`."""
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    activation: Activation
    attention_dropout: float
    rope: RopeParams
    json: Mapping[str, Any] = field(repr=False, hash=False)
    """The `config.json` this was read from, unchanged."""

    @property
    def fused_projections(self) -> bool:
        """Checkpoints hold q, k and v as one matrix `qkv_proj`, and gate and up as `gate_up_proj`."""
        return self.family == "phi3"

    @property
    def gemma_style(self) -> bool:
        """Embeddings are scaled by sqrt(hidden_size) and RMSNorm multiplies by (1 + weight)."""
        return self.family == "gemma"


@dataclass(frozen=True)
class _Family:
    """What transformers assumes for this `model_type` where config.json is silent, and where it reads biases."""

    causal_lm: str
    norm_eps: float = 1e-6
    tied: bool = False
    kv_heads_default_to_heads: bool = False
    default_head_dim: int | None = None
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    default_activation: str = "silu"
    qkv_bias: bool | None = None  # None: the config's `attention_bias` decides, for all four projections
    has_mlp_bias: bool = False


FAMILIES: dict[FamilyName, _Family] = {
    "llama": _Family("LlamaForCausalLM", kv_heads_default_to_heads=True, has_mlp_bias=True),
    "mistral": _Family("MistralForCausalLM", qkv_bias=False),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias=True),
    "gemma": _Family(
        "GemmaForCausalLM",
        tied=True,
        default_head_dim=256,
        # The first releases say "gelu" and mean its tanh approximation; transformers reads it so, too.
        activations={"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
        default_activation="gelu_pytorch_tanh",
    ),
    "phi3": _Family("Phi3ForCausalLM", norm_eps=1e-5, kv_heads_default_to_heads=True, qkv_bias=False),
}
_SUPPORTED = ", ".join(f"{name} ({family.causal_lm})" for name, family in FAMILIES.items())


def unsupported(message: str) -> UserError:
    """The error for a model that is complete but can't be built."""
    return UserError("model_unsupported", message, param="model")


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that `config` (the parsed config.json) describes.

    Raises UserError `model_unsupported` naming the model type, key or value that can't be built, and
    `model_incomplete` naming a key that is missing.
    """
    name, family = _family(config)
    _refuse_what_is_not_built(config)
    heads = _count(config, "num_attention_heads")
    hidden = _count(config, "hidden_size")
    kv_heads = _kv_heads(config, family, heads)
    head_dim = _head_dim(config, family, hidden, heads)
    rope = read_rope(config)
    attention_bias = _flag(config, "attention_bias", default=False)
    return Architecture(
        family=name,
        vocab_size=_count(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size"),
        num_layers=_count(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_number(config, "rms_norm_eps", default=family.norm_eps),
        max_seq_len=_max_seq_len(config, rope),
        tied=_flag(config, "tie_word_embeddings", default=family.tied),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        attention_output_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=family.has_mlp_bias and _flag(config, "mlp_bias", default=False),
        activation=_activation(config, family),
        attention_dropout=_number(config, "attention_dropout", default=0.0),
        rope=rope.for_head_dim(head_dim),
        json=config,
    )


def inspect_model_dir(path: Path) -> Architecture:
    """The architecture of a model directory in Hugging Face layout that is complete and can be trained.

    Cheap: reads config.json and the headers of the weight files, no tensor. Raises UserError (param "model"):
    `model_not_found`, `model_incomplete` naming the file, `model_unsupported` naming the architecture or setting.
    """
    if not path.is_dir():
        raise UserError("model_not_found", f"there is no model directory {path}.", param="model")
    arch = read_architecture(read_json_object(path / "config.json"))
    check_weights(path, arch)
    if not (path / "tokenizer.json").is_file():
        raise incomplete(
            f"{path} has no tokenizer.json. If it has a tokenizer of another format, load it with transformers' "
            "AutoTokenizer and save it again with save_pretrained(), which writes tokenizer.json."
        )
    return arch


def _family(config: Mapping[str, Any]) -> tuple[FamilyName, _Family]:
    model_type = config.get("model_type")
    classes = _names(config, "architectures")
    for name, family in FAMILIES.items():
        if name == model_type:
            if classes and family.causal_lm not in classes:
                raise unsupported(f"the model is a {', '.join(classes)}; supported are: {_SUPPORTED}.")
            return name, family
    shown = ", ".join(classes) or "no architecture named"
    raise unsupported(f"models of type {model_type!r} ({shown}) can't be trained here; supported are: {_SUPPORTED}.")


def _refuse_what_is_not_built(config: Mapping[str, Any]) -> None:
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise unsupported(f"the weights are quantised ({method}); give the unquantised model instead.")
    if config.get("use_bidirectional_attention"):
        raise unsupported("config.json asks for use_bidirectional_attention; only causal models can be trained.")
    for key in ("resid_pdrop", "embd_pdrop"):
        if config.get(key):
            raise unsupported(f"config.json sets {key}={config[key]}; this dropout is not built.")
    kinds = set(_names(config, "layer_types")) - {"full_attention", "sliding_attention"}
    if kinds:
        raise unsupported(f"config.json has layer_types {', '.join(sorted(kinds))}, which are not built.")


def _kv_heads(config: Mapping[str, Any], family: _Family, heads: int) -> int:
    absent = "num_key_value_heads" not in config and family.kv_heads_default_to_heads
    given_as_null = "num_key_value_heads" in config and config["num_key_value_heads"] is None
    kv_heads = heads if absent or given_as_null else _count(config, "num_key_value_heads")
    if heads % kv_heads:
        raise unsupported(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}.")
    return kv_heads


def _head_dim(config: Mapping[str, Any], family: _Family, hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        head_dim = _count(config, "head_dim")
    elif family.default_head_dim:
        head_dim = family.default_head_dim
    elif hidden % heads:
        raise unsupported(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}.")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise unsupported(f"head_dim {head_dim} is odd; rotary embeddings need an even one.")
    return head_dim


def _max_seq_len(config: Mapping[str, Any], rope: RopeParams) -> int:
    """The longest sequence for which full attention and unswitched RoPE equal what the model defines."""
    limits = [_count(config, "max_position_embeddings")]
    uses_window = config["model_type"] in ("mistral", "phi3") or config.get("use_sliding_window")
    if uses_window and config.get("sliding_window") is not None:
        limits.append(_count(config, "sliding_window"))
    if rope.kind == "longrope":
        limits.append(rope.original_context)
    return min(limits)


def _activation(config: Mapping[str, Any], family: _Family) -> Activation:
    asked = [config.get("hidden_act") or family.default_activation, config.get("hidden_activation")]
    unknown = [name for name in asked if name is not None and str(name) not in family.activations]
    if unknown:
        known = ", ".join(family.activations)
        raise unsupported(f"config.json asks for the activation {unknown[0]!r}; built for this family: {known}.")
    return family.activations[str(asked[0])]


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of names, empty where the key is absent or null. (A string alone counts as a list of one.)"""
    value = config.get(key) or []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise unsupported(f"config.json: {key} must be a list, is {value!r}.")
    return [str(name) for name in value]


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if value is None:
        raise UserError("model_incomplete", f"config.json lacks {key}.", param="model")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise unsupported(f"config.json: {key} must be a positive integer, is {value!r}.")
    return value


def _number(config: Mapping[str, Any], key: str, *, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise unsupported(f"config.json: {key} must be a number from 0 to 1, is {value!r}.")
    return float(value)


def _flag(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise unsupported(f"config.json: {key} must be true or false, is {value!r}.")
    return value

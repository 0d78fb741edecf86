"""Reads a Hugging Face `config.json` into an `Architecture`: all that building, loading and training a model needs.

Reading is strict: a setting that would change the model's outputs and is not built here is refused by name, because a
model that trains slightly wrong is worse than one that doesn't train.

To add a model family, read its `configuration_*.py` and `modeling_*.py` in transformers, then:

1. Add its `model_type` to `FamilyName` and an entry to `FAMILIES`: a `_Family` of the defaults in its configuration
   class (which may differ from the values of the published models), and of how its keys are read.
2. If its layers compute something that no other family does, add a property to `Architecture` (such as `qk_norm`), and
   use it in `decoder.py` (the computation), `layout.py` (names and shapes of the checkpoint's tensors) and
   `planning/memory.py` (activations). A new kind of RoPE goes into `rope_config.py` and `rope.py`, a new activation
   into `Activation` and `feed_forward.py`.
3. Refuse every other key that its modelling file reads and that changes outputs: `_refuse_what_is_not_built`.
4. Describe a tiny model in `tests/tiny_models.py` (`_FAMILIES`, `_layer_shapes`): most tests of models then run on it
   too. Add cases to `MODELS` in `tests/trainers/models/test_model_parity.py`, which compare logits, answers, adapters
   and exports with transformers and PEFT, and one to `tests/trainers/planning/test_memory.py`.
5. Add aliases to `names.py`, and the family to the README's list under "Limits".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trainers.errors import UserError
from trainers.models.model_files import check_weights, incomplete, read_json_object
from trainers.models.rope_config import RopeParams, read_layer_ropes

FamilyName = Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"]
Activation = Literal["silu", "gelu_tanh"]

MAX_LAYERS = 10_000
"""A config.json with more is refused as broken: the tables made from it would fill the memory."""


@dataclass(frozen=True)
class Architecture:
    """A complete description of a decoder-only transformer. Sizes are numbers of elements."""

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
    """Longest sequence, in tokens, whose outputs are exact. LongRoPE: the original context, beyond which other factors
    hold."""
    tied: bool
    """The output head is the embedding matrix; checkpoints hold no `lm_head.weight`."""
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    activation: Activation
    attention_dropout: float
    attention_scale: float
    """Queries times keys are multiplied by this."""
    attention_softcap: float | None
    """Attention scores x become c * tanh(x / c)."""
    final_softcap: float | None
    """Logits x become c * tanh(x / c)."""
    windows: tuple[int | None, ...]
    """The sliding window of each layer: the number of tokens that a token attends to at most, itself included. None: it
    attends to all before it."""
    rope: RopeParams
    """Rotary settings of the layers without a window; of all layers, unless the family has two settings."""
    local_rope: RopeParams
    """Rotary settings of the layers with a window."""
    json: Mapping[str, Any] = field(repr=False, hash=False)
    """The parsed `config.json`, unchanged."""

    @property
    def fused_projections(self) -> bool:
        """Checkpoints store q, k and v as one matrix `qkv_proj`, and gate and up as one matrix `gate_up_proj`."""
        return self.family == "phi3"

    @property
    def gemma_style(self) -> bool:
        """Embeddings are scaled by sqrt(hidden_size) and RMSNorm multiplies by (1 + weight)."""
        return self.family in ("gemma", "gemma2", "gemma3_text")

    @property
    def qk_norm(self) -> bool:
        """Queries and keys of each head are normalised before they are rotated."""
        return self.family in ("qwen3", "gemma3_text")

    @property
    def post_norms(self) -> bool:
        """The outputs of attention and feed-forward are normalised before they are added to the residual stream."""
        return self.family in ("gemma2", "gemma3_text")


@dataclass(frozen=True)
class _Family:
    """How config.json is read for one `model_type`: transformers' defaults for absent keys, and which keys it has."""

    causal_lm: str
    """Its class in transformers; another one in `architectures` is refused."""
    norm_eps: float = 1e-6
    tied: bool = False
    kv_heads_default_to_heads: bool = False
    default_head_dim: int | None = None
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    default_activation: str = "silu"
    qkv_bias: bool | None = None  # None: `attention_bias` of the config decides, for all four projections
    has_mlp_bias: bool = False
    windowed: Literal["never", "always", "on_request", "in_turn"] = "never"
    """Which layers have the sliding window. "on_request": those from `max_window_layers` on, if `use_sliding_window` is
    true; "in_turn": all but every `full_every`th. In both cases `layer_types` takes precedence if it is given."""
    default_window: int | None = 4096
    full_every: int = 1
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None  # not None: layers with a window have rotary settings of their own
    query_pre_attn_scalar: float | None = None  # None: scores are divided by sqrt(head_dim)
    softcaps: Mapping[str, float | None] = field(default_factory=dict)  # supported keys, and their defaults


_GELU_TANH: Mapping[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh"}
_GEMMA = _Family(
    "GemmaForCausalLM",
    tied=True,
    default_head_dim=256,
    # The first Gemma configs say "gelu" and mean its tanh approximation; transformers reads them like that, too.
    activations={"gelu": "gelu_tanh", **_GELU_TANH},
    default_activation="gelu_pytorch_tanh",
)
FAMILIES: dict[FamilyName, _Family] = {
    "llama": _Family("LlamaForCausalLM", kv_heads_default_to_heads=True, has_mlp_bias=True),
    "mistral": _Family("MistralForCausalLM", qkv_bias=False, windowed="always"),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias=True, windowed="on_request"),
    "qwen3": _Family("Qwen3ForCausalLM", default_head_dim=128, windowed="on_request"),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        causal_lm="Gemma2ForCausalLM",
        activations=_GELU_TANH,
        windowed="in_turn",
        full_every=2,
        query_pre_attn_scalar=256,
        softcaps={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": replace(
        _GEMMA,
        causal_lm="Gemma3ForCausalLM",
        activations=_GELU_TANH,
        windowed="in_turn",
        full_every=6,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
        query_pre_attn_scalar=256,
        softcaps={"final_logit_softcapping": None},
    ),
    "phi3": _Family(
        "Phi3ForCausalLM",
        norm_eps=1e-5,
        kv_heads_default_to_heads=True,
        qkv_bias=False,
        windowed="always",
        default_window=None,
    ),
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
    _refuse_what_is_not_built(config, family)
    heads = _count(config, "num_attention_heads")
    hidden = _count(config, "hidden_size")
    kv_heads = _kv_heads(config, family, heads)
    head_dim = _head_dim(config, family, hidden, heads)
    layers = _count(config, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise unsupported(f"config.json has num_hidden_layers {layers}; more than {MAX_LAYERS} are not supported.")
    rope, local_rope = read_layer_ropes(config, family.rope_theta, family.local_rope_theta)
    tied = _flag(config, "tie_word_embeddings", default=family.tied)
    final_softcap = _softcap(config, family, "final_logit_softcapping")
    if final_softcap and not tied:
        raise unsupported(
            "config.json has final_logit_softcapping without tie_word_embeddings, which is not supported."
        )
    attention_bias = _flag(config, "attention_bias", default=False)
    return Architecture(
        family=name,
        vocab_size=_count(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_number(config, "rms_norm_eps", default=family.norm_eps),
        max_seq_len=_max_seq_len(config, rope, local_rope),
        tied=tied,
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        attention_output_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=family.has_mlp_bias and _flag(config, "mlp_bias", default=False),
        activation=_activation(config, family),
        attention_dropout=_number(config, "attention_dropout", default=0.0),
        attention_scale=_attention_scale(config, family, head_dim),
        attention_softcap=_softcap(config, family, "attn_logit_softcapping"),
        final_softcap=final_softcap,
        windows=_windows(config, family, layers),
        rope=rope.for_head_dim(head_dim),
        local_rope=local_rope.for_head_dim(head_dim),
        json=config,
    )


def inspect_model_dir(path: Path, *, weights: bool = True) -> Architecture:
    """Checks that a model directory in Hugging Face layout is complete and can be trained; returns its architecture.

    Reads config.json and the headers of the weight files (unless `weights` is false), no tensors. Raises UserError
    (param "model"): `model_not_found`, `model_incomplete` naming the file, `model_unsupported` naming the architecture
    or setting.
    """
    if not path.is_dir():
        raise UserError("model_not_found", f"there is no model directory {path}.", param="model")
    arch = read_architecture(read_json_object(path / "config.json"))
    if weights:
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


def _refuse_what_is_not_built(config: Mapping[str, Any], family: _Family) -> None:
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise unsupported(f"the weights are quantised ({method}); give the unquantised model instead.")
    if config.get("use_bidirectional_attention"):
        raise unsupported("config.json asks for use_bidirectional_attention; only causal models can be trained.")
    for key in ("resid_pdrop", "embd_pdrop"):
        if config.get(key):
            raise unsupported(f"config.json sets {key}={config[key]}; this dropout is not supported.")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) and key not in family.softcaps:
            raise unsupported(f"config.json sets {key}={config[key]}; this soft-cap is not supported for this family.")
    kinds = set(_names(config, "layer_types")) - {"full_attention", "sliding_attention"}
    if kinds:
        raise unsupported(f"config.json has layer_types {', '.join(sorted(kinds))}, which are not supported.")


def _kv_heads(config: Mapping[str, Any], family: _Family, heads: int) -> int:
    absent = "num_key_value_heads" not in config and family.kv_heads_default_to_heads
    given_as_null = "num_key_value_heads" in config and config["num_key_value_heads"] is None
    kv_heads = heads if absent or given_as_null else _count(config, "num_key_value_heads")
    if heads % kv_heads:
        raise unsupported(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}.")
    return kv_heads


def _head_dim(config: Mapping[str, Any], family: _Family, hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        head_dim = _count(config, "head_dim")
    elif family.default_head_dim:
        head_dim = family.default_head_dim
    elif hidden % heads:
        raise unsupported(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise unsupported(f"head_dim {head_dim} is odd; rotary embeddings need an even one.")
    return head_dim


def _max_seq_len(config: Mapping[str, Any], *ropes: RopeParams) -> int:
    """LongRoPE switches to other factors beyond the original context; only those within it are built."""
    original_contexts = [rope.original_context for rope in ropes if rope.kind == "longrope"]
    return min([_count(config, "max_position_embeddings"), *original_contexts])


def _windows(config: Mapping[str, Any], family: _Family, layers: int) -> tuple[int | None, ...]:
    if family.windowed == "never":
        return (None,) * layers
    unused = family.windowed == "on_request" and not _flag(config, "use_sliding_window", default=False)
    window = None if unused else _window(config, family)
    if family.windowed == "always":
        return (window,) * layers
    sliding = _sliding_layers(config, family, layers, window)
    if window is None and any(sliding):
        raise unsupported("config.json has layers of sliding_attention, but no sliding_window is in force.")
    return tuple(window if slides else None for slides in sliding)


def _window(config: Mapping[str, Any], family: _Family) -> int | None:
    window = config.get("sliding_window", family.default_window)
    return None if window is None else _count({"sliding_window": window}, "sliding_window")


def _sliding_layers(config: Mapping[str, Any], family: _Family, layers: int, window: int | None) -> list[bool]:
    kinds = _names(config, "layer_types")
    if kinds and len(kinds) != layers:
        raise unsupported(f"config.json has {len(kinds)} layer_types for {layers} layers.")
    if kinds:
        return [kind == "sliding_attention" for kind in kinds]
    if family.windowed == "on_request":
        first = _count(config, "max_window_layers", default=28, least=0)
        return [window is not None and i >= first for i in range(layers)]
    every = _count(config, "sliding_window_pattern", default=family.full_every)
    if every != family.full_every and family.local_rope_theta is None:  # Gemma 2 doesn't read that key
        raise unsupported(
            f"config.json has sliding_window_pattern {every}; supported for this family: {family.full_every}."
        )
    return [(i + 1) % every != 0 for i in range(layers)]


def _attention_scale(config: Mapping[str, Any], family: _Family, head_dim: int) -> float:
    if family.query_pre_attn_scalar is None:
        return 1 / math.sqrt(head_dim)
    return 1 / math.sqrt(_positive(config, "query_pre_attn_scalar", family.query_pre_attn_scalar))


def _softcap(config: Mapping[str, Any], family: _Family, key: str) -> float | None:
    cap = config.get(key, family.softcaps.get(key))
    return None if cap is None or key not in family.softcaps else _positive({key: cap}, key, cap)


def _activation(config: Mapping[str, Any], family: _Family) -> Activation:
    asked = [config.get("hidden_act") or family.default_activation, config.get("hidden_activation")]
    unknown = [name for name in asked if name is not None and str(name) not in family.activations]
    if unknown:
        known = ", ".join(family.activations)
        raise unsupported(f"config.json asks for the activation {unknown[0]!r}; supported for this family: {known}.")
    return family.activations[str(asked[0])]


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of names; empty if the key is absent or null. A single string counts as a list of one."""
    value = config.get(key) or []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise unsupported(f"config.json: {key} must be a list, is {value!r}.")
    return [str(name) for name in value]


def _count(config: Mapping[str, Any], key: str, *, default: int | None = None, least: int = 1) -> int:
    value = config.get(key, default)
    if value is None:
        raise UserError("model_incomplete", f"config.json lacks {key}.", param="model")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise unsupported(f"config.json: {key} must be an integer of at least {least}, is {value!r}.")
    return value


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise unsupported(f"config.json: {key} must be a positive number, is {value!r}.")
    return float(value)


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

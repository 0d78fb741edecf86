"""Reads the rotary position settings of a `config.json`, as transformers 4 or transformers 5 spells them."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, cast, get_args

from trainers.errors import UserError

RopeKind = Literal["default", "linear", "llama3", "longrope"]


@dataclass(frozen=True)
class RopeParams:
    """The settings of one kind of RoPE. Fields that a kind does not use keep their default.

    `attention_factor` multiplies cos and sin. `short_factor` has head_dim / 2 entries, one per frequency.
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    short_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def for_head_dim(self, head_dim: int) -> "RopeParams":
        """These parameters; raises UserError if they don't fit heads of that size."""
        if self.kind == "longrope" and len(self.short_factor) != head_dim // 2:
            raise _refused(f"short_factor has {len(self.short_factor)} entries for {head_dim // 2} frequencies")
        return self


def read_layer_ropes(
    config: Mapping[str, Any], theta: float, local_theta: float | None
) -> tuple[RopeParams, RopeParams]:
    """The rotary settings of a parsed config.json: those of layers with full attention, and those of layers with a
    sliding window.

    `theta` and `local_theta` are the defaults. `local_theta` None: the family has the same settings in all layers.
    Raises UserError `model_unsupported` for settings that are not built.

    transformers 5 has everything in `rope_parameters`, by kind of layer if they differ. Version 4 has `rope_theta`,
    `rope_local_base_freq` and `rope_scaling`, in which old files call `rope_type` `type`. Values inside the dictionary
    take precedence, as in transformers.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise _refused(f"they must be an object, not {scaling!r}")
    outer = {"rope_theta": config.get("rope_theta", theta)}
    if local_theta is None:
        rope = _read(config, outer | dict(scaling))
        return rope, rope
    local = {"rope_theta": config.get("rope_local_base_freq", local_theta)}
    if not scaling or config.get("rope_scaling"):  # version 4 scales only the layers without a window
        return _read(config, outer | dict(scaling)), _read(config, local)
    kinds = {"full_attention": outer, "sliding_attention": local}
    if not scaling.keys() <= kinds.keys() or not all(isinstance(value, Mapping) for value in scaling.values()):
        raise _refused(f"rope_parameters must hold an object for each of {', '.join(kinds)}")
    full, sliding = (_read(config, values | dict(scaling.get(kind, {}))) for kind, values in kinds.items())
    return full, sliding


def _read(config: Mapping[str, Any], values: Mapping[str, Any]) -> RopeParams:
    if any(isinstance(value, Mapping) for value in values.values()):
        raise _refused("they differ between layers, which is not supported for this family")
    _refuse_partial_rotation(config, values)
    kind = _kind(values)
    theta = _positive(values, "rope_theta")
    if kind == "linear":
        return RopeParams(kind, theta, factor=_positive(values, "factor"))
    if kind == "llama3":
        return _llama3(config, values, theta)
    if kind == "longrope":
        return _longrope(config, values, theta)
    return RopeParams(kind, theta)


def _refused(problem: str) -> UserError:
    return UserError("model_unsupported", f"config.json, rotary position settings: {problem}.", param="model")


def _kind(values: Mapping[str, Any]) -> RopeKind:
    kind = values.get("rope_type") or values.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # LongRoPE's name when Phi-3 came out
    if kind not in get_args(RopeKind):
        raise _refused(f"rope type {kind!r} is not supported; these are: {', '.join(get_args(RopeKind))}")
    return cast(RopeKind, kind)


def _refuse_partial_rotation(config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    fraction = values.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if fraction != 1.0:
        raise _refused(f"partial_rotary_factor {fraction} is not supported; only 1.0 is")


def _llama3(config: Mapping[str, Any], values: Mapping[str, Any], theta: float) -> RopeParams:
    low, high = _positive(values, "low_freq_factor"), _positive(values, "high_freq_factor")
    if high <= low:
        raise _refused(f"high_freq_factor {high} must be greater than low_freq_factor {low}")
    return RopeParams(
        "llama3",
        theta,
        factor=_positive(values, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=_original_context(config, values),
    )


def _longrope(config: Mapping[str, Any], values: Mapping[str, Any], theta: float) -> RopeParams:
    """Only the short factors are read: they apply within the original context, to which sequences are limited here."""
    original = _original_context(config, values)
    factors = values.get("short_factor")
    if not isinstance(factors, list) or not all(_is_positive(x) for x in factors):
        raise _refused("short_factor must be a list of positive numbers")
    if values.get("attention_factor") is None:
        attention_factor = _longrope_attention_factor(config, values, original)
    else:
        attention_factor = _positive(values, "attention_factor")
    return RopeParams(
        "longrope",
        theta,
        original_context=original,
        short_factor=tuple(float(x) for x in factors),
        attention_factor=attention_factor,
    )


def _longrope_attention_factor(config: Mapping[str, Any], values: Mapping[str, Any], original: int) -> float:
    """sqrt(1 + ln(factor) / ln(original context)): LongRoPE (arXiv 2402.13753), as transformers applies it."""
    factor = (
        _positive(values, "factor") if values.get("factor") else _positive(config, "max_position_embeddings") / original
    )
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _original_context(config: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    """Phi-3 has it next to `rope_scaling`, Llama 3 inside it; transformers prefers the outer one."""
    key = "original_max_position_embeddings"
    original = int(_positive({key: config.get(key) or values.get(key) or config.get("max_position_embeddings")}, key))
    if original < 2:
        raise _refused(f"{key} is {original}")
    return original


def _positive(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if not _is_positive(value):
        raise _refused(f"{key} must be a positive number, is {value!r}")
    return float(value)


def _is_positive(value: Any) -> TypeGuard[float]:  # noqa: ANN401  -- any JSON value
    """Whether it is a number above 0 that a float can represent."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max

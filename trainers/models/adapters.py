"""Saves and loads LoRA and DoRA adapters in PEFT's layout, and merges them into their base model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainers.errors import storage_away
from trainers.models.architecture import Architecture
from trainers.models.export_files import write_json, write_safetensors
from trainers.models.layout import Linear, Part, adapts, linears
from trainers.models.model_files import incomplete
from trainers.planning.plan import LoraSpec

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MAGNITUDE = ".magnitude"
"""Suffix of the name of a layer's magnitudes [rows], which only DoRA has."""
_PREFIX = "base_model.model."


def save_peft_adapter(
    adapter_state: Mapping[str, Tensor],
    arch: Architecture,
    lora: LoraSpec,
    base_model: str,
    out_dir: Path,
    revision: str | None = None,
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` and vLLM load. Values are stored unchanged. `base_model`
    is a path, or a repository on a hub, whose commit `revision` was trained on (None: the newest).

    If a family fuses projections (Phi-3's qkv_proj), PEFT needs one adapter for the fused layer: the A matrices are
    stacked, and the B matrices become the diagonal blocks of one matrix, which computes the same. Its rank, a multiple
    of `lora.rank`, is given in `rank_pattern`. Magnitudes are concatenated; with DoRA, parts without an adapter need
    theirs, too (`untouched_magnitudes`).
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    multiples: dict[str, int] = {}
    for linear in linears(arch):
        adapted = _adapted_parts(linear, adapter_state)
        if adapted:
            a, b = _fuse(linear, adapted, adapter_state)
            tensors[f"{_PREFIX}{linear.name}.lora_A.weight"] = a
            tensors[f"{_PREFIX}{linear.name}.lora_B.weight"] = b
            multiples[linear.name.rpartition(".")[2]] = len(adapted)
            if f"{adapted[0].name}{MAGNITUDE}" in adapter_state:
                magnitudes = [adapter_state[f"{part.name}{MAGNITUDE}"].detach().cpu() for part in linear.parts]
                tensors[_magnitude_name(linear)] = torch.cat(magnitudes)
    write_safetensors(tensors, out_dir / ADAPTER_FILE)
    dora = any(name.endswith(MAGNITUDE) for name in adapter_state)
    config = {"base_model_name_or_path": base_model, "revision": revision, **_peft_config(lora, multiples)}
    write_json(config | {"use_dora": dora}, out_dir / ADAPTER_CONFIG)


def load_peft_adapter(adapter_dir: Path, arch: Architecture, lora: LoraSpec) -> dict[str, Tensor]:
    """The adapter state that `save_peft_adapter` wrote for the same `arch` and `lora`, bit for bit, on the CPU.

    Raises UserError `model_incomplete` for an adapter that can't be read, or has another rank or alpha."""
    file = adapter_dir / ADAPTER_FILE
    try:
        stored = load_file(file)
        file = adapter_dir / ADAPTER_CONFIG
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        if storage_away(error):
            raise
        raise incomplete(f"{file} can't be read: {error}.") from None
    if (config.get("r"), config.get("lora_alpha")) != (lora.rank, lora.alpha):
        raise incomplete(f"{adapter_dir} is an adapter of another rank or alpha than {lora.rank} and {lora.alpha}.")
    state: dict[str, Tensor] = {}
    for linear in linears(arch):
        adapted = [part for part in linear.parts if adapts(lora, part.name)]
        if adapted:
            state |= _unfuse(linear, adapted, stored, lora.rank, adapter_dir)
            if (magnitudes := stored.get(_magnitude_name(linear))) is not None:
                rows = torch.split(magnitudes, [part.rows for part in linear.parts])
                each = zip(linear.parts, rows, strict=True)
                state |= {f"{part.name}{MAGNITUDE}": value.contiguous() for part, value in each if part in adapted}
    return state


def merge_lora(
    base_state: Mapping[str, Tensor],
    adapter_state: Mapping[str, Tensor],
    lora: LoraSpec,
    like: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The base's parameters with the adapter merged in: W + alpha / rank * B @ A. With DoRA, each row is then scaled to
    the length that its magnitude says.

    Computed in float32; the result has the dtype of the parameter in `like`, or without `like` that of W. Parameters
    without an adapter are passed on, not copied; `base_state` is not changed.
    """
    merged = dict(base_state)
    for name, a in adapter_state.items():
        layer, found, _ = name.rpartition(".lora_a.weight")
        if found:
            base = base_state[f"{layer}.weight"]
            delta = adapter_state[f"{layer}.lora_b.weight"].float() @ a.float()
            weight = base.float() + lora.alpha / lora.rank * delta
            if (magnitude := adapter_state.get(f"{layer}{MAGNITUDE}")) is not None:
                weight *= (magnitude.float() / torch.linalg.norm(weight, dim=1))[:, None]
            merged[f"{layer}.weight"] = weight.to((like or base_state)[f"{layer}.weight"].dtype)
    return merged


def untouched_magnitudes(
    base_state: Mapping[str, Tensor], adapter_state: Mapping[str, Tensor], arch: Architecture
) -> dict[str, Tensor]:
    """The magnitudes that PEFT needs besides those of a DoRA adapter: for the parts without an adapter of fused layers
    whose other parts have one, the lengths of their rows, in float32."""
    parts = (part for linear in linears(arch) if _adapted_parts(linear, adapter_state) for part in linear.parts)
    return {
        f"{part.name}{MAGNITUDE}": torch.linalg.norm(base_state[f"{part.name}.weight"].float(), dim=1)
        for part in parts
        if f"{part.name}{MAGNITUDE}" not in adapter_state
    }


def _adapted_parts(linear: Linear, state: Mapping[str, Tensor]) -> list[Part]:
    return [part for part in linear.parts if f"{part.name}.lora_a.weight" in state]


def _fuse(linear: Linear, adapted: list[Part], state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One pair (A [k*r, in], B [out, k*r]) for the k adapted parts of a linear layer."""
    a = torch.cat([state[f"{part.name}.lora_a.weight"].detach().cpu() for part in adapted])
    b = torch.zeros(linear.rows, a.shape[0], dtype=a.dtype, device="cpu")
    for part, rows, columns in _blocks(linear, adapted, a.shape[0] // len(adapted)):
        b[rows, columns] = state[f"{part.name}.lora_b.weight"].detach().cpu()
    return a, b


def _unfuse(
    linear: Linear, adapted: list[Part], stored: Mapping[str, Tensor], rank: int, adapter_dir: Path
) -> dict[str, Tensor]:
    names = [f"{_PREFIX}{linear.name}.lora_{kind}.weight" for kind in "AB"]
    if not all(name in stored for name in names):
        raise incomplete(f"{adapter_dir / ADAPTER_FILE} lacks the adapter of {linear.name}.")
    a, b = (stored[name] for name in names)
    state: dict[str, Tensor] = {}
    for part, rows, columns in _blocks(linear, adapted, rank):
        state[f"{part.name}.lora_a.weight"] = a[columns].contiguous()
        state[f"{part.name}.lora_b.weight"] = b[rows, columns].contiguous()
    return state


def _magnitude_name(linear: Linear) -> str:
    return f"{_PREFIX}{linear.name}.lora_magnitude_vector"


def _blocks(linear: Linear, adapted: list[Part], rank: int) -> Iterator[tuple[Part, slice, slice]]:
    """The place of each adapted part's B in the fused B: the part's rows of the layer, and its own `rank` columns."""
    row = 0
    for part in linear.parts:
        if part in adapted:
            column = adapted.index(part) * rank
            yield part, slice(row, row + part.rows), slice(column, column + rank)
        row += part.rows


def _peft_config(lora: LoraSpec, multiples: Mapping[str, int]) -> dict[str, Any]:
    fused = {name: multiple for name, multiple in multiples.items() if multiple > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(multiples),
        "rank_pattern": {name: lora.rank * multiple for name, multiple in fused.items()},
        "alpha_pattern": {name: lora.alpha * multiple for name, multiple in fused.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
    }

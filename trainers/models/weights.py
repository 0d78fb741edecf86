"""Loads Hugging Face checkpoints as our decoder's parameters, and saves them. Saving exactly reverses loading."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainers.errors import storage_away
from trainers.models.architecture import FAMILIES, Architecture
from trainers.models.export_files import copy_companions, write_json, write_safetensors
from trainers.models.layout import CheckpointTensor, checkpoint_tensors
from trainers.models.model_files import INDEX_FILE, SINGLE_FILE, WEIGHTS_KEY, incomplete, weight_files

MAX_SHARD_BYTES = 5_000_000_000


def load_weights(model_dir: Path, arch: Architecture, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Our decoder's parameters from a checkpoint, on the CPU, in `dtype` (None: the stored one).

    Tensors that keep the stored dtype are memory-mapped, copy on write: they take memory only once they are read, and
    changing them never changes the file. Raises UserError `model_incomplete`.
    """
    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(file)) for file in weight_files(model_dir)]
        by_name = {name: file for file in files for name in file.keys()}  # noqa: SIM118  -- not a dict
        for tensor in checkpoint_tensors(arch):
            stored = _stored(by_name, tensor, model_dir)
            for part, value in zip(tensor.parts, _split(stored, tensor), strict=True):
                weights[part.name] = value if dtype is None else value.to(dtype)
        if arch.tied and "lm_head.weight" in by_name:
            _check_tied_copy(by_name["lm_head.weight"].get_tensor("lm_head.weight"), weights["tok_embeddings.weight"])
    return weights


def save_hf_model(
    state_dict: Mapping[str, Tensor],
    arch: Architecture,
    source_dir: Path,
    out_dir: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model directory that transformers and vLLM load as it is.

    `state_dict` holds our decoder's parameters (adapters merged). config.json is `arch.json` with the new dtype; the
    tokenizer and the generation config are copied from `source_dir`. Files have mode 0644. `out_dir` must be new or
    empty. Files appear one by one: a caller that needs the directory to appear complete renames it afterwards.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(state_dict, arch, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {tensor.name: _join(state_dict, tensor) for tensor in shard}
        write_safetensors(tensors, out_dir / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(_size(state_dict, tensor) for shard in shards for tensor in shard)
        write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, out_dir / INDEX_FILE)
    write_json(_exported_config(arch, state_dict["tok_embeddings.weight"].dtype), out_dir / "config.json")
    copy_companions(source_dir, out_dir)


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        if storage_away(error):
            raise
        raise incomplete(f"{file} is not a readable safetensors file: {error}.") from None


def _stored(by_name: Mapping[str, Any], tensor: CheckpointTensor, model_dir: Path) -> Tensor:
    if tensor.name not in by_name:
        raise incomplete(f"{model_dir}: the weights lack {tensor.name}.")
    stored: Tensor = by_name[tensor.name].get_tensor(tensor.name)
    if stored.shape != tensor.shape:
        raise incomplete(
            f"{model_dir}: {tensor.name} has shape {list(stored.shape)}, config.json asks for {list(tensor.shape)}."
        )
    return stored


def _split(stored: Tensor, tensor: CheckpointTensor) -> tuple[Tensor, ...]:
    return torch.split(stored, [part.rows for part in tensor.parts])


def _join(state_dict: Mapping[str, Tensor], tensor: CheckpointTensor) -> Tensor:
    parts = [state_dict[part.name].detach().cpu() for part in tensor.parts]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _size(state_dict: Mapping[str, Tensor], tensor: CheckpointTensor) -> int:
    return sum(state_dict[part.name].nbytes for part in tensor.parts)


def _shards(
    state_dict: Mapping[str, Tensor], arch: Architecture, max_shard_bytes: int
) -> Iterator[list[CheckpointTensor]]:
    """The tensors of each file, in the order of the model. A tensor larger than `max_shard_bytes` gets its own file."""
    shard: list[CheckpointTensor] = []
    used = 0
    for tensor in checkpoint_tensors(arch):
        size = _size(state_dict, tensor)
        if shard and used + size > max_shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(tensor)
        used += size
    yield shard


def _exported_config(arch: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The model's config.json, with the dtype of the weights under the key that both transformers 4 and 5 read, and
    with `architectures`, by which vLLM chooses the model class."""
    dropped = ("dtype", "_name_or_path", "auto_map", WEIGHTS_KEY)
    config = {key: value for key, value in arch.json.items() if key not in dropped}
    config["architectures"] = config.get("architectures") or [FAMILIES[arch.family].causal_lm]
    return config | {"torch_dtype": str(dtype).removeprefix("torch.")}


def _check_tied_copy(head: Tensor, embedding: Tensor) -> None:
    if not torch.equal(head.to(embedding.dtype), embedding):
        raise incomplete(
            "config.json says that the output head is tied to the embedding, but the weights hold an lm_head.weight "
            "that differs from it: set tie_word_embeddings to false, or remove that tensor."
        )

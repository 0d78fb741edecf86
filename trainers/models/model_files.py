"""Finds and checks the files of a model directory in Hugging Face layout, without reading tensors.

Weights are only ever read from safetensors: a `.bin` checkpoint is a pickle, and loading one runs the code in it.
"""

from __future__ import annotations

import errno
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainers.errors import InfrastructureError, UserError
from trainers.models.layout import checkpoint_tensors

if TYPE_CHECKING:  # `architecture` imports this module
    from trainers.models.architecture import Architecture

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_KEY = "transformers_weights"
"""The key of config.json that names the file of weights, or their index, if it has neither of these two names."""
INDEX_SUFFIX = ".safetensors.index.json"
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element of the dtypes that weights may be stored in."""
# The API process reads headers and JSON files, and parsing JSON blocks its other threads. The largest models that can
# be built here have some thousand tensors, at about a hundred bytes each; safetensors itself allows headers of 100 MB.
_MAX_HEADER_BYTES = 8_000_000
_MAX_JSON_BYTES = 16_000_000
_POINTER = b"version "  # how a Git LFS pointer begins (https://git-lfs.github.com/spec/v1); no header is that long
_FAULTS_OF_A_PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


class TensorEntry(NamedTuple):
    """One tensor's entry in a safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset in the file, in bytes."""
    size: int
    """Bytes in the file."""


def incomplete(message: str) -> UserError:
    """The error for a model directory in which something is missing or broken."""
    return UserError("model_incomplete", message, param="model")


@contextmanager
def storage_of(path: Path) -> Iterator[None]:
    """Turns an OSError that comes from the disk (input/output error, stale handle, ...) into an InfrastructureError
    `model_unreachable`. One that is about `path` itself (it doesn't exist, isn't readable, ...) is raised unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno in _FAULTS_OF_A_PATH:
            raise
        raise InfrastructureError(
            "model_unreachable",
            f"{path} can't be read: {error.strerror or error}",
            suggestion="ask the operator to check the disk that the model is on",
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a model directory. Raises UserError `model_incomplete`, or as `storage_of`."""
    try:
        with storage_of(path):
            if path.exists() and not path.is_file():  # reading a pipe or a device may never end
                raise incomplete(f"{path} is not a regular file.")
            if path.stat().st_size > _MAX_JSON_BYTES:
                raise incomplete(f"{path} is too large: {path.stat().st_size} bytes.")
            value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise incomplete(f"the model directory {path.parent} has no {path.name}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise incomplete(f"{path} can't be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise incomplete(f"{path} must hold a JSON object.")
    return value


def named_weights(config: Mapping[str, Any], origin: object) -> str | None:
    """The file of weights, or their index, that the config.json of the model at `origin` names; None if it names none.
    The file may not exist. Raises UserError `model_incomplete` for a name that is not a safetensors file beside it."""
    named = config.get(WEIGHTS_KEY)
    if named is None:
        return None
    if not isinstance(named, str) or Path(named).name != named or not named.endswith((".safetensors", INDEX_SUFFIX)):
        raise incomplete(f"{origin}: {WEIGHTS_KEY} of config.json names no safetensors beside it: {named!r}.")
    return named


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that hold the model, in a fixed order. If there are several sets of weights, those that
    transformers loads: the ones named by `transformers_weights` in config.json, else the single file, else the shards.

    Raises UserError `model_incomplete`, which says what is missing: all weights, a shard of the index, or only the
    safetensors form. InfrastructureError as `storage_of`.
    """
    with storage_of(model_dir):
        return _weight_files(model_dir)


def _weight_files(model_dir: Path) -> list[Path]:
    if (model_dir / "config.json").is_file():
        named = named_weights(read_json_object(model_dir / "config.json"), model_dir)
        if named is not None:
            return _named_files(model_dir, named)
    if (model_dir / SINGLE_FILE).is_file():
        return [model_dir / SINGLE_FILE]
    if (model_dir / INDEX_FILE).is_file():
        return _indexed_files(model_dir / INDEX_FILE)
    if (model_dir / "adapter_config.json").is_file():
        raise incomplete(f"{model_dir} holds an adapter, not a model: merge it into its base model first.")
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt*")):
        raise incomplete(
            f"{model_dir} has its weights only as pickle files (.bin), which are never opened here: load the model "
            "with transformers and save it again with save_pretrained(), which writes safetensors."
        )
    raise incomplete(f"{model_dir} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there.")


def check_weights(model_dir: Path, arch: Architecture) -> None:
    """Checks that the weight files are complete and hold exactly the tensors of `arch`, in floating point.

    Reads headers only. Raises UserError `model_incomplete` or `model_unsupported`.
    """
    found = read_headers(weight_files(model_dir))
    expected = {tensor.name: tensor.shape for tensor in checkpoint_tensors(arch)}
    missing = [name for name in expected if name not in found]
    if missing:
        raise incomplete(f"{model_dir}: the weights lack {first_few(missing)}.")
    unknown = [name for name in found if name not in expected and not is_ignored(name, arch)]
    if unknown:
        raise _unsupported(
            f"{model_dir}: the weights hold tensors that {arch.family} models don't have: {first_few(unknown)}."
        )
    for name, shape in expected.items():
        entry = found[name]
        if entry.shape != shape:
            raise incomplete(f"{entry.file}: {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}.")
        if entry.dtype not in FLOAT_BYTES:
            raise _unsupported(
                f"{entry.file}: {name} is stored as {entry.dtype}; give weights in float32, float16 or bfloat16."
            )
        if entry.size != FLOAT_BYTES[entry.dtype] * math.prod(shape):
            raise incomplete(f"{entry.file}: {name} has {entry.size} bytes, which is not what its shape takes.")


def is_ignored(name: str, arch: Architecture) -> bool:
    """Whether it is a tensor that some checkpoints contain and no model reads: a rotary table, or a copy of a tied
    head."""
    return name.endswith("rotary_emb.inv_freq") or (arch.tied and name == "lm_head.weight")


def read_headers(files: list[Path]) -> dict[str, TensorEntry]:
    """The tensors of some safetensors files, by name. Raises UserError `model_incomplete` for a broken or truncated
    file, or as `storage_of`."""
    entries: dict[str, TensorEntry] = {}
    for file in files:
        entries |= _header(file)
    return entries


def _header(file: Path) -> dict[str, TensorEntry]:
    """The file format: length of the header (8 bytes, little endian), the header (JSON), the tensors."""
    try:
        with storage_of(file), file.open("rb") as stream:
            begin = stream.read(8)
            if begin == _POINTER:
                raise incomplete(f"{file} only points to the weights, as a clone without Git LFS: run 'git lfs pull'.")
            (length,) = struct.unpack("<Q", begin)
            header = json.loads(stream.read(_allowed(length)))
            size = file.stat().st_size
        header.pop("__metadata__", None)
        end = 8 + length + _bytes_of_tensors(entry["data_offsets"] for entry in header.values())
        entries = {name: _entry(file, 8 + length, **fields) for name, fields in header.items()}
    except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise incomplete(f"{file} is not a readable safetensors file: {error}.") from None
    if size != end:
        raise incomplete(f"{file} has {size} bytes, its header says {end}: was the download cut short?")
    return entries


def _allowed(length: int) -> int:
    """`length`, unless it is more than is read of a header: then raises ValueError."""
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, {_MAX_HEADER_BYTES} are read at most")
    return length


def _bytes_of_tensors(offsets: Iterable[tuple[int, int]]) -> int:
    """The end of the last tensor. Raises ValueError or TypeError unless the offsets are contiguous integers."""
    position = 0
    for start, end in sorted(offsets):
        if not (isinstance(start, int) and isinstance(end, int)):
            raise TypeError("data_offsets are no integers")
        if start != position or end < start:
            raise ValueError(f"no tensor begins at byte {position}")
        position = end
    return position


def _entry(file: Path, base: int, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> TensorEntry:
    start, end = data_offsets
    return TensorEntry(file, str(dtype), tuple(shape), base + start, end - start)


def _named_files(model_dir: Path, named: str) -> list[Path]:
    file = model_dir / named
    if not file.is_file():
        raise incomplete(f"{model_dir} has no {named}, which {WEIGHTS_KEY} of config.json names.")
    return _indexed_files(file) if named.endswith(INDEX_SUFFIX) else [file]


def _indexed_files(index: Path) -> list[Path]:
    files = [index.with_name(name) for name in indexed_names(index)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise incomplete(f"{index.parent} lacks the weight files {first_few(missing)} that {index.name} names.")
    return files


def indexed_names(index: Path) -> list[str]:
    """The names of the safetensors files in an index; the files may not exist. Raises UserError `model_incomplete`."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise incomplete(f"{index} has no weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        raise incomplete(f"{index} names files that are no safetensors beside it: {first_few(outside)}.")
    return names


def _unsupported(message: str) -> UserError:
    return UserError("model_unsupported", message, param="model")


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """The first of `names` for a message, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

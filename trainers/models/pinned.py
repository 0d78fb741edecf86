"""Pins a job to the model it began with, which all its attempts use. Its adapters, optimizer state and tokenised rows
don't fit another model, even if that has the same name by now.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from events.disk import sync_path
from trainers.errors import UserError
from trainers.models.model_files import incomplete, read_headers, storage_of, weight_files
from trainers.models.resolve import classify_model, lasting_name, resolve_model
from trainers.settings import Settings

_READ_WHOLE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_SAMPLE_BYTES = 4096


class PinnedModel(BaseModel):
    """A model as a job found it."""

    model_config = ConfigDict(frozen=True)

    name: str
    """See `lasting_name`."""
    directory: Path
    files: dict[str, str]
    """See `fingerprints`."""


def pinned_model(model: str, file: Path, settings: Settings, log: Callable[[str], None]) -> PinnedModel:
    """The job's model: the one that `file`, in the job's directory, records; if there is no such file, resolves `model`
    and records the result in it. A cached copy is used without asking the hub or store it came from; if it is no longer
    in the cache, it is fetched again.

    Raises what `resolve_model` does, UserError `model_incomplete`, and `model_changed` if the model is a different one
    now, or gone. InfrastructureError if a disk or a network fails, which says nothing about the model.
    """
    if not file.is_file():
        directory = resolve_model(model, settings, log)
        found = PinnedModel(name=lasting_name(model, directory), directory=directory, files=fingerprints(directory))
        _write(found, file)
        return found
    pinned = PinnedModel.model_validate_json(file.read_bytes())
    try:
        with storage_of(pinned.directory):
            cached = pinned.directory.is_dir()
        if classify_model(pinned.name) == "local" or not cached:
            pinned = pinned.model_copy(update={"directory": resolve_model(pinned.name, settings, log)})
    except UserError as problem:
        if problem.error.code not in ("model_not_found", "model_incomplete"):
            raise
        raise _changed(pinned, problem.error.message.removesuffix(".")) from problem
    check_unchanged(pinned)
    return pinned


def check_unchanged(pinned: PinnedModel) -> None:
    """Raises UserError `model_changed` if the model's files are not those that the job began with, or as
    `storage_of`."""
    try:
        now = fingerprints(pinned.directory)
    except UserError as problem:
        raise _changed(pinned, problem.error.message.removesuffix(".")) from problem
    changed = [name for name in sorted({*pinned.files, *now}) if pinned.files.get(name) != now.get(name)]
    if changed:
        raise _changed(pinned, f"{', '.join(changed)} of {pinned.directory}")


def fingerprints(directory: Path) -> dict[str, str]:
    """A SHA-256 for each file that training depends on, by its path in `directory`. That of a file of weights covers
    each tensor's name, dtype, shape, offset and its first and last 4,096 bytes, so that gigabytes need not be read.

    Raises UserError `model_incomplete`, or as `storage_of`.
    """
    try:
        with storage_of(directory):
            whole = [file for pattern in _READ_WHOLE for file in sorted(directory.glob(pattern))]
            digests = {f"{file.relative_to(directory)}": _sha256(file) for file in whole if file.is_file()}
            return digests | {file.name: _of_weights(file) for file in weight_files(directory)}
    except OSError as error:
        raise incomplete(f"{directory} can't be read: {error}.") from None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _of_weights(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for name, entry in read_headers([file]).items():
            digest.update(f"{name} {entry.dtype} {entry.shape} {entry.start} {entry.size}\n".encode())
            for start in (entry.start, entry.start + max(0, entry.size - _SAMPLE_BYTES)):
                stream.seek(start)
                digest.update(stream.read(min(_SAMPLE_BYTES, entry.size)))
    return digest.hexdigest()


def _write(pinned: PinnedModel, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_bytes(pinned.model_dump_json(indent=2).encode() + b"\n")
    sync_path(draft)
    draft.replace(file)
    sync_path(file.parent)


def _changed(pinned: PinnedModel, evidence: str) -> UserError:
    return UserError(
        "model_changed",
        f"the model {pinned.name} is not what it was when the job began ({evidence})",
        param="model",
        suggestion="submit the job again to train what it is now, or go on from the job's last checkpoint with "
        "/fine_tuning/jobs/resubmit, which no longer needs this model",
        retryable=True,
    )

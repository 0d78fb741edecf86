"""The model that a job began with. All its attempts are on that one: adapters, an optimizer's state and tokenised rows
mean nothing to another, though it may have the same name by now.
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
    """The model that `file` of a job's directory names; where there is none yet, what `model` stands for now, which
    the file names from then on. A copy of it that is in the cache is used without asking where it came from; one that
    isn't any more is fetched again.

    Raises what `resolve_model` does, UserError `model_incomplete`, and `model_changed` where there is something else
    now, or nothing. InfrastructureError where a disk or a network doesn't answer, which says nothing about the model.
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
    """Raises UserError `model_changed` when the model's directory holds something else than the job began with, or as
    `storage_of`."""
    try:
        now = fingerprints(pinned.directory)
    except UserError as problem:
        raise _changed(pinned, problem.error.message.removesuffix(".")) from problem
    changed = [name for name in sorted({*pinned.files, *now}) if pinned.files.get(name) != now.get(name)]
    if changed:
        raise _changed(pinned, f"{', '.join(changed)} of {pinned.directory}")


def fingerprints(directory: Path) -> dict[str, str]:
    """Of each file that training depends on, by its name: of a small one the SHA-256; of weights that of every tensor's
    name, type, place, first and last few kilobytes, so that nobody waits for gigabytes to be read.

    Raises UserError `model_incomplete`, or as `storage_of`.
    """
    try:
        with storage_of(directory):
            whole = [file for pattern in _READ_WHOLE for file in sorted(directory.glob(pattern))]
            digests = {f"{file.relative_to(directory)}": _sha256(file) for file in whole}
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

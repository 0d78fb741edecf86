"""Copies model directories from object stores (s3://, gs://), each state of a directory once."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from trainers.errors import InfrastructureError, JobProblem, UserError
from trainers.models.cache import make_once
from trainers.models.wanted_files import CHAT_TEMPLATES, choose_files, may_be_wanted

Log = Callable[[str], None]
_PIECE_BYTES = 16 << 20
_IDENTITY_KEYS = ("size", "ETag", "etag", "md5Hash", "generation", "mtime")


def copy(uri: str, cache_dir: Path, log: Log, *, weights: bool = True) -> Path:
    """A local copy of the model directory at `uri`, made again if any of its files has changed. If `weights` is false,
    the copy may lack the safetensors files.

    Raises UserError `model_not_found`, `model_access_denied`, `model_incomplete`, `model_unsupported`, `model_changed`;
    InfrastructureError `model_unreachable`, `storage_full` or `storage_unreachable`. Credentials come from the
    environment.
    """
    with _store_errors(uri):
        fs, root = fsspec.core.url_to_fs(uri)
        fs.invalidate_cache()
        files = _list_files(fs, root)
    state = _state(files)
    key = hashlib.sha256(repr((uri.rstrip("/"), state)).encode()).hexdigest()[:32]
    path = cache_dir / "remote" / key
    weights = weights or path.is_dir()
    if not weights:
        path = path.with_name(f"{key}-without-weights")

    def fetch(partial: Path) -> None:
        def get(name: str) -> None:
            _get(fs, uri, files[name], partial / name)

        try:
            names = choose_files(files, partial, get, uri)
            names = [name for name in names if weights or not name.endswith(".safetensors")]
            log(f"copying {len(names)} files from {uri}, {sum(files[name]['size'] for name in names) / 1e9:.2f} GB")
            for name in names:
                get(name)
        except JobProblem:  # may be due to a change: a file is gone, or isn't the version that was listed
            check(partial)
            raise
        check(partial)

    def check(partial: Path) -> None:
        with _store_errors(uri):
            fs.invalidate_cache()
            now = _state(_list_files(fs, root))
        if now != state:
            shutil.rmtree(partial)  # a mixture of two states is of no use to anyone
            raise UserError(
                "model_changed",
                f"{uri} changed while it was copied",
                param="model",
                suggestion="try again once it is complete",
                retryable=True,
            )

    return make_once(path, fetch, log)


def _list_files(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, dict[str, Any]]:
    """The store's entries for the files of a model directory, by their paths in it."""
    entries = fs.ls(root, detail=True)
    files = {Path(entry["name"]).name: entry for entry in entries if _is_file(entry)}
    for folder in entries:
        if folder["type"] == "directory" and Path(folder["name"]).name == CHAT_TEMPLATES:
            inner = fs.ls(folder["name"], detail=True)
            files |= {f"{CHAT_TEMPLATES}/{Path(entry['name']).name}": entry for entry in inner if _is_file(entry)}
    return files


def _state(files: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """What identifies this state of the directory: names, sizes, hashes, times."""
    wanted = sorted(name for name in files if may_be_wanted(name))
    return [(name, *(str(files[name].get(key)) for key in _IDENTITY_KEYS)) for name in wanted]


def _is_file(entry: dict[str, Any]) -> bool:
    """False also for the empty objects that stand for folders in a store: their names end with a slash."""
    return entry["type"] == "file" and not entry["name"].endswith("/")


def _get(fs: fsspec.AbstractFileSystem, uri: str, entry: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    with target.open("wb") as sink:
        for piece in _pieces(fs, uri, entry["name"]):
            sink.write(piece)  # its errors are the local disk's


def _pieces(fs: fsspec.AbstractFileSystem, uri: str, name: str) -> Iterator[bytes]:
    with _store_errors(uri), fs.open(name, "rb") as source:
        while piece := source.read(_PIECE_BYTES):
            yield piece


@contextmanager
def _store_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except JobProblem:
        raise
    except FileNotFoundError as error:
        raise UserError(
            "model_not_found", f"there is no model directory at {uri}", param="model", suggestion="check the URI"
        ) from error
    except PermissionError as error:
        raise UserError(
            "model_access_denied",
            f"the workers' credentials don't open {uri}",
            param="model",
            suggestion="ask the operator for credentials that open it, or use another model",
        ) from error
    except Exception as error:  # each store's client has its own exceptions, whose texts may contain signed URLs
        raise InfrastructureError(
            "model_unreachable",
            f"{uri} could not be read: {type(error).__name__}.",
            suggestion="check the workers' network and credentials",
        ) from error

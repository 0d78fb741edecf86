"""Checks the URIs of data files, and reads their lines.

A data URI is a local path (bare or `file://`), which must be under a configured root; an object that fsspec can read:
`s3://`, `gs://`, `hf://` (`memory://` in tests); or the id of an uploaded file, `file-...`. Credentials come from the
environment, never from the URI. No error of this module repeats a URI that may contain a secret, nor the text of a
storage library's exception.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

import fsspec

from trainers.data.dialog import MAX_ROW_BYTES
from trainers.errors import InfrastructureError, UserError
from trainers.files import file_store, is_file_id
from trainers.settings import Settings

REMOTE_SCHEMES = ("s3", "gs", "hf", "memory")
_BLOCK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


class Hash(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None: ...


def check_data_uri(uri: str, settings: Settings) -> str:
    """The normal form of `uri`: `file:///real/path` or the remote URI. Cheap: doesn't look at remote objects.

    Local paths are resolved, relative ones against each data root in turn; they must be non-empty regular files that
    are under a root after links are followed. The id of an uploaded file becomes the URI of its bytes. Raises UserError
    (unsupported_scheme, credentials_in_uri, path_outside_roots, data_not_found, data_is_directory, data_not_a_file,
    data_not_readable, data_empty, file_not_found) without a param: the caller knows the field.
    """
    if is_file_id(uri):
        return file_store(settings.files_url).locate(uri)
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _check_local(uri, settings).as_uri()
    if scheme == "file":
        return _check_local(_path_of(uri), settings).as_uri()
    if scheme not in REMOTE_SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", *REMOTE_SCHEMES))
        raise UserError(
            "unsupported_scheme", "data can't be read from this kind of URI", suggestion=f"use a path or one of {known}"
        )
    if "@" in rest.partition("/")[0]:
        raise UserError(
            "credentials_in_uri",
            "the URI holds credentials",
            suggestion="put them into the workers' environment instead",
        )
    if "::" in rest:
        raise UserError("unsupported_scheme", f"{uri}: '::' would chain file systems; data is one object of one store")
    if not rest.strip("/"):
        raise UserError("data_not_found", f"{uri} names no file")
    return uri


def open_lines(uri: str, digest: Hash | None = None) -> Iterator[tuple[int, bytes]]:
    """Lines of a checked URI with their numbers from 1, without line breaks and byte order marks; blank lines are left
    out.

    Reads in blocks: memory doesn't grow with the file. A line longer than MAX_ROW_BYTES is cut to MAX_ROW_BYTES + 1
    bytes, which `parse_row` refuses. `digest` is updated with everything that is read. Raises UserError
    (data_not_found, data_is_directory, data_not_readable, data_empty) or InfrastructureError (data_unreachable),
    possibly after some lines.
    """
    for number, line in enumerate(_split(_blocks(uri, digest)), start=1):
        text = line.removeprefix(_BOM)  # on the first line, or on others if files with BOMs were concatenated
        if text.strip():
            yield number, text.removesuffix(b"\r")


def content_digest(uri: str) -> str:
    """A hash of the bytes of a checked URI. Raises as `open_lines` does."""
    digest = hashlib.sha256()
    for _ in _blocks(uri, digest):
        pass
    return digest.hexdigest()


def data_size(uri: str) -> int | None:
    """Size in bytes of a checked URI; None if the storage doesn't tell."""
    try:
        size = fsspec.core.url_to_fs(_plain(uri))[0].size(_plain(uri))
    except Exception:  # noqa: BLE001  -- only progress needs it; reading reports what is wrong
        return None
    return int(size) if size is not None else None


def _check_local(path: str, settings: Settings) -> Path:
    try:
        found = _resolve(path, settings)
        info = found.stat()
    except FileNotFoundError:
        raise UserError("data_not_found", f"there is no file {path}") from None
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a name too long, a loop of links
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError("data_not_found", f"{path!r} can't be opened: {reason}") from None
    if stat.S_ISDIR(info.st_mode):
        raise UserError("data_is_directory", f"{path} is a directory", suggestion="name a JSONL file in it")
    if not stat.S_ISREG(info.st_mode):
        raise UserError("data_not_a_file", f"{path} is not a regular file")
    if not os.access(found, os.R_OK):
        raise UserError(
            "data_not_readable",
            f"{path} can't be read, permission is denied",
            suggestion="give the service permission to read it",
        )
    if info.st_size == 0:
        raise UserError("data_empty", f"{path} is empty", suggestion="write one JSON object per line into it")
    return found


def _resolve(path: str, settings: Settings) -> Path:
    """The real path, after links are followed. Reveals nothing about files outside the roots, not even whether they
    exist."""
    roots = [root.resolve() for root in settings.allowed_data_roots]
    candidates = [(root / path).resolve() for root in roots]
    inside = [real for real in candidates if any(real.is_relative_to(root) for root in roots)]
    found = next((real for real in inside if real.exists()), None)
    if found is None and len(inside) < len(candidates):
        raise UserError(
            "path_outside_roots",
            f"{path} is outside the directories that data may be read from",
            suggestion="move it into one of them, upload it, or ask the operator to add its directory to "
            "TUNEWRIGHT_DATA_ROOTS",
        )
    return found or inside[0]


def _path_of(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise UserError("unsupported_scheme", "a file:// URI must have an absolute path: file:///path/to/data.jsonl")
    return os.fsdecode(unquote_to_bytes(parts.path))


def _plain(uri: str) -> str:
    """The path of a file URI, or the remote URI: fsspec doesn't decode percent signs in file URIs."""
    return _path_of(uri) if uri.startswith("file://") else uri


def _open(uri: str) -> Any:  # noqa: ANN401  -- fsspec has no types
    if uri.startswith("file://"):
        return Path(_path_of(uri)).open("rb", buffering=0)
    filesystem, path = fsspec.core.url_to_fs(uri)
    return filesystem.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")


def _blocks(uri: str, digest: Hash | None) -> Iterator[bytes]:
    empty = True
    try:
        with closing(_open(uri)) as file:
            while block := file.read(_BLOCK_BYTES):
                empty = False
                if digest is not None:
                    digest.update(block)
                yield block
    except FileNotFoundError:
        raise UserError("data_not_found", f"there is no file {uri}") from None
    except IsADirectoryError:
        raise UserError("data_is_directory", f"{uri} is a directory", suggestion="name a JSONL file in it") from None
    except PermissionError:
        raise UserError(
            "data_not_readable",
            f"{uri} can't be read, permission is denied",
            suggestion="give the nodes permission to read it",
        ) from None
    except Exception as error:  # noqa: BLE001  -- storage libraries raise what they like, and put signed URLs into it
        raise InfrastructureError(
            "data_unreachable",
            f"{uri} can't be read: {type(error).__name__}.",
            suggestion="check the workers' network and credentials, and submit the job again",
        ) from None
    if empty:
        raise UserError("data_empty", f"{uri} is empty", suggestion="write one JSON object per line into it")


def _split(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their b"\\n", each cut at MAX_ROW_BYTES + 1 bytes."""
    limit = MAX_ROW_BYTES + 1
    rest = bytearray()
    for block in blocks:
        head, found, tail = block.partition(b"\n")
        rest += head[: limit - len(rest)]
        if not found:
            continue
        yield bytes(rest)
        lines = tail.split(b"\n")
        rest = bytearray(lines.pop()[:limit])
        yield from (line[:limit] for line in lines)
    if rest:
        yield bytes(rest)

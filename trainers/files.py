"""Files that were uploaded to the service: bytes, and a record that says what they are.

They lie in one flat directory, local or on anything that fsspec reaches, as two objects each: `bytes-<ulid>` and, once
those are complete, `<file id>.json`, which names them. A file is there exactly if its record is. What a crash leaves
behind are bytes that no record names; `sweep` collects them after a day, and what is left of an upload in parts soon
after that has expired. A record never changes, so any number of
processes may work on one directory; where two complete one upload at the same time, the record of the second stays.
"""

import hashlib
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict
from ulid import ULID

from events.disk import sync_path
from trainers.errors import InfrastructureError, UserError

logger = logging.getLogger("tunewright.files")

PURPOSE, RESULTS_PURPOSE = "fine-tune", "fine-tune-results"
RESULTS_PREFIX = "file-results-"
"""Of the id of a job's result file, which is derived from the log and lies nowhere."""
BLOCK_BYTES = 1 << 20
LEFT_OVER_S = 24 * 3600
"""Bytes without a record that are younger than this may belong to an upload that is under way."""
UPLOAD_LIFETIME_S = 3600
"""Of an upload in parts."""
PART_LEFT_OVER_S = UPLOAD_LIFETIME_S + 900
"""Parts of an upload that began longer ago than this are not needed any more, not even by the completing of it that
began in time."""
_ULID = "[0-9A-HJKMNP-TV-Z]{26}"
_FILE_ID = re.compile(f"file-{_ULID}")


def is_file_id(text: str) -> bool:
    """Whether it may name an uploaded file."""
    return _FILE_ID.fullmatch(text) is not None


class File(BaseModel):
    """The record of an uploaded file. Times are Unix seconds."""

    model_config = ConfigDict(frozen=True)

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None
    content: str
    """The object that holds its bytes."""

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


@contextmanager
def _storage() -> Iterator[None]:
    """Makes an InfrastructureError `files_unreachable` of whatever goes wrong with the storage. Its libraries raise
    what they like and put signed URLs into it, so nothing of their text is told: the operator's log has its kind, and
    where it was raised."""
    try:
        yield
    except InfrastructureError:
        raise
    except Exception as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("the storage of uploaded files doesn't work: %s, %s\n%s", type(error).__name__, why, where)  # noqa: TRY400
        raise InfrastructureError(
            "files_unreachable",
            f"the storage of uploaded files doesn't work: {why}.",
            suggestion="try again; if that doesn't help, the operator finds the reason in the log: the room, network "
            "or credentials of what TUNEWRIGHT_FILES names",
        ) from error


class Objects:
    """A flat directory of objects. Everything blocks, and raises InfrastructureError `files_unreachable` where the
    storage can't be read or written."""

    @_storage()
    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = "file" in ([self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol)
        self._fs.makedirs(self._root, exist_ok=True)

    @_storage()
    def sizes(self) -> dict[str, int]:
        """Every object's name and bytes."""
        try:
            found = self._fs.ls(self._root, detail=True, refresh=True)
        except FileNotFoundError:  # an object store has no empty directories
            return {}
        return {info["name"].rpartition("/")[2]: int(info["size"] or 0) for info in found if info["type"] == "file"}

    @_storage()
    def get(self, name: str) -> bytes | None:
        """What a small object holds; None where there is none."""
        try:
            content: bytes = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return content

    @_storage()
    def put(self, name: str, content: bytes) -> None:
        """Writes a small object, whole or not at all, over what was there. It, and all that was written before it, is
        there after a power cut."""
        draft = f"draft-{ULID()}"
        with self.open_new(draft) as file:
            file.write(content)
            sync(file)
        self._fs.mv(self._path(draft), self._path(name))
        if self._local:
            sync_path(self._root)

    @_storage()
    def open_new(self, name: str) -> Any:  # noqa: ANN401  -- fsspec has no types
        return self._fs.open(self._path(name), "wb", block_size=8 << 20)

    def read(self, name: str, start: int = 0) -> Iterator[bytes]:
        """In blocks, from byte `start` on."""
        with (
            _storage(),
            self._fs.open(self._path(name), "rb", block_size=BLOCK_BYTES, cache_type="readahead") as file,
        ):
            file.seek(start)
            while block := file.read(BLOCK_BYTES):
                yield block

    @_storage()
    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def uri(self, name: str) -> str:
        """What `trainers.data.source` reads it by."""
        path = self._path(name)
        return Path(path).as_uri() if self._local else str(self._fs.unstrip_protocol(path))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class NewObject:
    """Bytes on their way to storage, counted and hashed. `abandon` unless they became part of something. Raises
    InfrastructureError `files_unreachable`."""

    def __init__(self, objects: Objects, name: str) -> None:
        self.name = name
        self.bytes = 0
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.head = bytearray()
        """The first bytes: what kind of file it is."""
        self._objects = objects
        self._file = objects.open_new(name)

    @_storage()
    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.bytes += len(data)
        self.md5.update(data)
        if len(self.head) < BLOCK_BYTES:
            self.head += data[: BLOCK_BYTES - len(self.head)]

    @_storage()
    def close(self) -> None:
        """All of it is on disk, or accepted by the object store, when this returns."""
        sync(self._file)
        self._file.close()

    def abandon(self) -> None:
        with suppress(Exception):  # whatever is wrong with the storage, there was an error before this one
            self._file.close()
        with suppress(Exception):
            self._objects.delete(self.name)


class FileStore:
    """The uploaded files under one URL. Everything blocks, and raises InfrastructureError `files_unreachable`."""

    def __init__(self, url: str) -> None:
        self.objects = Objects(url)
        self._records: dict[str, File] = {}
        self._swept = float("-inf")

    def new(self) -> NewObject:
        return NewObject(self.objects, f"bytes-{ULID()}")

    def keep(self, new: NewObject, filename: str, expires_after_s: int | None, file_id: str | None = None) -> File:
        """Makes a file of bytes that are complete. If there is one of this id, that one it is, and the bytes are
        abandoned, as they are when the file can't be made."""
        if file_id is not None and (kept := self.find(file_id)) is not None:
            new.abandon()
            return kept
        now = int(time.time())
        file = File(
            id=file_id or f"file-{ULID()}",
            bytes=new.bytes,
            created_at=now,
            filename=filename,
            purpose=PURPOSE,
            expires_at=None if expires_after_s is None else now + expires_after_s,
            content=new.name,
        )
        try:
            self.objects.put(f"{file.id}.json", file.model_dump_json().encode())
        except InfrastructureError:
            with suppress(InfrastructureError):  # where nobody can tell whether it is written, they are left to `sweep`
                if self.find(file.id) is None:
                    new.abandon()
            raise
        return file

    def find(self, file_id: str) -> File | None:
        """One that has expired too; None where there is none."""
        content = self.objects.get(f"{file_id}.json") if is_file_id(file_id) else None
        if content is None:
            return None
        file = self._records[file_id] = File.model_validate_json(content)
        return file

    def get(self, file_id: str) -> File:
        """Raises UserError `file_not_found`, also when it has expired."""
        file = self.find(file_id)
        if file is None or file.expired(time.time()):
            raise UserError(
                "file_not_found",
                f"there is no file {ascii(file_id)[1:-1]} (it was deleted, has expired, or never was)",
                "file_id",
                suggestion="upload it again",
            )
        return file

    def locate(self, file_id: str) -> str:
        """The URI of its bytes, for a job that has it already: a file in use doesn't expire. Raises UserError
        `file_not_found`."""
        file = self.find(file_id)
        if file is None:
            raise UserError("file_not_found", f"the file {file_id} was deleted", suggestion="upload it again")
        return self.objects.uri(file.content)

    def files(self) -> list[File]:
        """All that have not expired, oldest first."""
        now = time.time()
        return [file for file in self._all(self.objects.sizes()) if not file.expired(now)]

    def used_bytes(self) -> int:
        """What is stored, whatever it belongs to."""
        return sum(self.objects.sizes().values())

    def read(self, file: File, start: int = 0) -> Iterator[bytes]:
        """Its bytes from `start` on, in blocks."""
        return self.objects.read(file.content, start)

    def delete(self, file: File) -> None:
        self.objects.delete(f"{file.id}.json")
        self.objects.delete(file.content)
        self._records.pop(file.id, None)

    def sweep(self, in_use: Collection[str], every_s: float = 600) -> None:
        """Deletes files that have expired and are not `in_use`, and left-overs. Does nothing if it did so lately."""
        if time.monotonic() - self._swept < every_s:
            return
        self._swept = time.monotonic()
        now = time.time()
        sizes = self.objects.sizes()
        files = self._all(sizes)
        for file in files:
            if file.expired(now) and file.id not in in_use:
                self.delete(file)
        named = {file.content for file in files}
        left_over = [name for name in sizes if name not in named and _is_left_over(name, now)]
        if any(name.startswith("bytes-") for name in left_over):
            # Of two processes that complete an upload at the same time, the second writes its record over the first's,
            # which may be the one that is remembered here.
            self._records.clear()
            named = {file.content for file in self._all(sizes)}
        for name in left_over:
            if name not in named:
                self.objects.delete(name)

    def _all(self, sizes: dict[str, int]) -> list[File]:
        ids = sorted(name.removesuffix(".json") for name in sizes if name.endswith(".json"))
        files = (self._records.get(file_id) or self.find(file_id) for file_id in ids if is_file_id(file_id))
        return [file for file in files if file is not None]


def _is_left_over(name: str, now: float) -> bool:
    """Whether an object that no record names is old enough to be nobody's."""
    made = re.search(_ULID, name) if name.startswith(("bytes-", "draft-", "upload_")) else None
    left_over_s = PART_LEFT_OVER_S if ".part_" in name else LEFT_OVER_S
    return made is not None and now - ULID.from_str(made[0]).timestamp > left_over_s  # of a part, when its upload began


@cache
def file_store(url: str) -> FileStore:
    """This process's store at `url`: it remembers records."""
    return FileStore(url)


def check_jsonl(head: bytes) -> None:
    """Whether a file that begins with `head` can be JSONL: its first line is a JSON object. Raises UserError
    (`file_empty`, `not_jsonl`). Every other line is looked at by the job that uses it."""
    for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        if len(head) >= BLOCK_BYTES and b"\n" not in head:
            return  # a line that long is refused by the job, with its number
        try:
            row = json.loads(line.decode())  # of bytes it would take UTF-16, too
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(
                "not_jsonl",
                "the file is not JSONL, as its first line is not a JSON object in UTF-8",
                suggestion='write each row as one line, e.g. {"dialog": [...]}',
            )
        return
    raise UserError("file_empty", "the file is empty")


def sync(file: Any) -> None:  # noqa: ANN401  -- fsspec has no types
    """Local files are on disk when this returns; an object store promises that by itself when one is closed."""
    file.flush()
    try:
        descriptor = file.fileno()
    except (OSError, AttributeError):
        return
    os.fsync(descriptor)

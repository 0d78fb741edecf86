"""Files that were uploaded to the service: the bytes of each, and a record with its name, size and purpose.

All are in one flat directory, local or in any storage that fsspec can reach. A file is two objects: `bytes-<ulid>` and,
once the bytes are complete, the record `<file id>.json`, which names the former. A file exists if its record does. A
crash can only leave bytes that no record names. `sweep` deletes these after a day, and the rest of an upload in parts
soon after it has expired. Records never change, so any number of processes may work on one directory; if two complete
the same upload at the same time, the record of the second stays.
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
"""Prefix of the id of a job's result file, which is generated from the event log and isn't stored."""
BLOCK_BYTES = 1 << 20
LEFT_OVER_S = 24 * 3600
"""Bytes without a record that are younger than this may belong to an upload in progress."""
UPLOAD_LIFETIME_S = 3600
"""Lifetime of an upload in parts."""
PART_LEFT_OVER_S = UPLOAD_LIFETIME_S + 900
"""Parts of an upload that began longer ago than this aren't needed any more, not even by a request to complete it that
came in time."""
_ULID = "[0-9A-HJKMNP-TV-Z]{26}"
_FILE_ID = re.compile(f"file-{_ULID}")


def is_file_id(text: str) -> bool:
    """Whether `text` has the form of an uploaded file's id."""
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
    """Name of the object with the bytes."""

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


@contextmanager
def _storage() -> Iterator[None]:
    """Turns every exception into an InfrastructureError `files_unreachable`. Storage libraries may raise anything, and
    put signed URLs into their messages, so these are not repeated: the operator's log has the exception's type and
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
    """A flat directory of objects. All methods block, and raise InfrastructureError `files_unreachable` if the storage
    can't be read or written."""

    @_storage()
    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = "file" in ([self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol)
        self._fs.makedirs(self._root, exist_ok=True)

    @_storage()
    def sizes(self) -> dict[str, int]:
        """The size in bytes of each object, by name."""
        try:
            found = self._fs.ls(self._root, detail=True, refresh=True)
        except FileNotFoundError:  # object stores have no empty directories
            return {}
        return {info["name"].rpartition("/")[2]: int(info["size"] or 0) for info in found if info["type"] == "file"}

    @_storage()
    def get(self, name: str) -> bytes | None:
        """The content of a small object; None if there is no such object."""
        try:
            content: bytes = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return content

    @_storage()
    def put(self, name: str, content: bytes) -> None:
        """Writes or replaces a small object, atomically. This object, and all that was written before it, survives a
        power cut."""
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
        """The content in blocks, from byte `start` on."""
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
        """The URI by which `trainers.data.source` reads the object."""
        path = self._path(name)
        return Path(path).as_uri() if self._local else str(self._fs.unstrip_protocol(path))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class NewObject:
    """An object that is being written; its bytes are counted and hashed. Call `abandon` if it isn't needed after all.
    Raises InfrastructureError `files_unreachable`."""

    def __init__(self, objects: Objects, name: str) -> None:
        self.name = name
        self.bytes = 0
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.head = bytearray()
        """The first bytes (BLOCK_BYTES at most), for a check of the format."""
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
        """When this returns, all bytes are on disk, or accepted by the object store."""
        sync(self._file)
        self._file.close()

    def abandon(self) -> None:
        with suppress(Exception):  # an error of the storage would hide the one that led here
            self._file.close()
        with suppress(Exception):
            self._objects.delete(self.name)


class FileStore:
    """The uploaded files under one URL. All methods block, and raise InfrastructureError `files_unreachable`."""

    def __init__(self, url: str) -> None:
        self.objects = Objects(url)
        self._records: dict[str, File] = {}
        self._swept = float("-inf")

    def new(self) -> NewObject:
        return NewObject(self.objects, f"bytes-{ULID()}")

    def keep(self, new: NewObject, filename: str, expires_after_s: int | None, file_id: str | None = None) -> File:
        """Makes a file of bytes that are complete. If there is a file with this id already, returns that one. Then, and
        if the file can't be made, the bytes are abandoned."""
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
            with suppress(InfrastructureError):  # if nobody can tell whether the record exists, `sweep` will look
                if self.find(file.id) is None:
                    new.abandon()
            raise
        return file

    def find(self, file_id: str) -> File | None:
        """The record of a file, also of one that has expired; None if there is none."""
        content = self.objects.get(f"{file_id}.json") if is_file_id(file_id) else None
        if content is None:
            return None
        file = self._records[file_id] = File.model_validate_json(content)
        return file

    def get(self, file_id: str) -> File:
        """The record of a file. Raises UserError `file_not_found`, also if the file has expired."""
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
        """The URI of a file's bytes, for a job that was accepted with it: a file in use doesn't expire. Raises
        UserError `file_not_found`."""
        file = self.find(file_id)
        if file is None:
            raise UserError("file_not_found", f"the file {file_id} was deleted", suggestion="upload it again")
        return self.objects.uri(file.content)

    def files(self) -> list[File]:
        """All that have not expired, oldest first."""
        now = time.time()
        return [file for file in self._all(self.objects.sizes()) if not file.expired(now)]

    def used_bytes(self) -> int:
        """Total size of everything stored, incomplete uploads included."""
        return sum(self.objects.sizes().values())

    def read(self, file: File, start: int = 0) -> Iterator[bytes]:
        """Its bytes from `start` on, in blocks."""
        return self.objects.read(file.content, start)

    def delete(self, file: File) -> None:
        self.objects.delete(f"{file.id}.json")
        self.objects.delete(file.content)
        self._records.pop(file.id, None)

    def sweep(self, in_use: Collection[str], every_s: float = 600) -> None:
        """Deletes files that have expired and are not `in_use`, and left-overs. Does nothing if it ran less than
        `every_s` ago."""
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
            # If two processes complete an upload at the same time, the second one's record replaces the first one's,
            # which may be the one in `_records`.
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
    """Whether an object that no record names is old enough to be deleted."""
    made = re.search(_ULID, name) if name.startswith(("bytes-", "draft-", "upload_")) else None
    left_over_s = PART_LEFT_OVER_S if ".part_" in name else LEFT_OVER_S
    return made is not None and now - ULID.from_str(made[0]).timestamp > left_over_s  # a part has its upload's ULID


@cache
def file_store(url: str) -> FileStore:
    """This process's store for `url`. There is one per URL, as it caches records."""
    return FileStore(url)


def check_jsonl(head: bytes) -> None:
    """Raises UserError (`file_empty`, `not_jsonl`) unless the first line of a file that begins with `head` is a JSON
    object. The other lines are checked by the job that uses the file."""
    for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        if len(head) >= BLOCK_BYTES and b"\n" not in head:
            return  # a line that long will be refused by the job, with its number
        try:
            row = json.loads(line.decode())  # without decode(), UTF-16 would be accepted, too
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
    """Flushes a local file to disk. An object store guarantees that by itself when an object is closed."""
    file.flush()
    try:
        descriptor = file.fileno()
    except (OSError, AttributeError):
        return
    os.fsync(descriptor)

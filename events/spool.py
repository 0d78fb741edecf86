"""The log lines of one job on disk: append-only, addressed by offset (the line's number, from 0).

    <job dir>/log.ndjson   one JSON object a line: timestamp, message, source, seq
    <job dir>/log.index    every now and then: "line `offset` begins at `byte`; these sources had come this far"

The index makes reads from any offset and reopening cheap; it is written after the lines it speaks of and may be
deleted at any time: then the file is read from its start once.

Lines reach the operating system before `append` returns, so they survive the death of any process. They are not
fsynced: a power cut may take the last seconds of output (never an event), and an fsync a batch would bind the training
loop's output to the disk.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict

MAX_MESSAGE = 16_384
"""Longer messages are cut to this many characters, and a mark says how long they were."""
_MARK_LINES = 1000
_MARK_BYTES = 256 * 1024


class Line(TypedDict):
    """One log line, as the API shows it."""

    message: str
    timestamp: str


class _Mark(NamedTuple):
    offset: int
    byte: int
    sources: dict[str, int]


class Spool:
    """One job's lines. `append` calls must not overlap; reads may run in other threads meanwhile."""

    def __init__(self, directory: Path) -> None:
        """Opens what is there. A line that a crash tore is cut off: it was not acknowledged."""
        self._file = directory / "log.ndjson"
        self._index = directory / "log.index"
        self.lines = 0
        """Lines written: the offset of the next one."""
        self._bytes = 0
        self._sources: dict[str, int] = {}
        self._offsets = [0]  # of the marked lines ...
        self._starts = [0]  # ... and the bytes they begin at
        self._recover()

    @staticmethod
    def exists(directory: Path) -> bool:
        return (directory / "log.ndjson").exists()

    def append(self, source: str, seq: int, lines: Sequence[tuple[str, str]]) -> list[Line]:
        """Adds (timestamp, message) pairs, the first of which is line `seq` of `source`; those it has are skipped.

        Returns what was added. Raises OSError; then this object is of no use any more: open the directory again.
        """
        expected = self._sources.get(source, 0)
        skipped = max(expected - seq, 0)
        added: list[Line] = [
            {"message": _presentable(message), "timestamp": timestamp} for timestamp, message in lines[skipped:]
        ]
        if not added:
            return []
        first = seq + skipped
        text = "".join(_record(line, source, first + number) for number, line in enumerate(added))
        self._write(text.encode())
        self.lines += len(added)
        self._sources[source] = first + len(added)
        self._mark_now_and_then()
        return added

    def next_seq(self, source: str) -> int:
        return self._sources.get(source, 0)

    def read(self, first: int, limit: int, max_bytes: int) -> list[Line]:
        """Up to `limit` lines from offset `first` on, as many as fit into `max_bytes` of the file but at least one."""
        lines: list[Line] = []
        read = 0
        for offset, raw in self._from_mark_before(first):
            if offset < first:
                continue
            read += len(raw)
            if lines and read > max_bytes:
                break
            record = json.loads(raw)
            lines.append({"message": record["message"], "timestamp": record["timestamp"]})
            if len(lines) == limit:
                break
        return lines

    def _from_mark_before(self, first: int) -> Iterator[tuple[int, bytes]]:
        end = self.lines
        mark = bisect_right(self._offsets, first) - 1
        with self._file.open("rb") as file:
            file.seek(self._starts[mark])
            yield from zip(range(self._offsets[mark], end), file, strict=False)

    def _write(self, data: bytes) -> None:
        file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.write(file, data[written:])
        finally:
            os.close(file)
        self._bytes += len(data)

    def _mark_now_and_then(self) -> None:
        if self.lines - self._offsets[-1] < _MARK_LINES and self._bytes - self._starts[-1] < _MARK_BYTES:
            return
        self._remember(_Mark(self.lines, self._bytes, self._sources))
        with self._index.open("a") as file:
            file.write(json.dumps({"offset": self.lines, "byte": self._bytes, "sources": self._sources}) + "\n")

    def _remember(self, mark: _Mark) -> None:
        self._starts.append(mark.byte)
        self._offsets.append(mark.offset)  # last: readers look a line up here and then in _starts

    def _recover(self) -> None:
        if not self._file.exists():
            return
        size = self._file.stat().st_size
        for mark in self._marks():
            self._remember(mark)
            self.lines, self._bytes, self._sources = mark.offset, mark.byte, mark.sources
        with self._file.open("rb") as file:
            file.seek(self._bytes)
            for raw in file:
                record = _parse(raw)
                if record is None:
                    break
                self._sources[record["source"]] = record["seq"] + 1
                self.lines += 1
                self._bytes += len(raw)
                if self.lines - self._offsets[-1] >= _MARK_LINES:
                    self._remember(_Mark(self.lines, self._bytes, self._sources))
        if self._bytes < size:
            os.truncate(self._file, self._bytes)

    def _marks(self) -> list[_Mark]:
        """The index, cut off where it speaks of lines that a power cut took."""
        if not self._index.exists():
            return []
        marks: list[_Mark] = []
        good = 0
        with self._index.open("rb") as index, self._file.open("rb") as file:
            for raw in index:
                fields = _parse(raw)
                if fields is None or not _begins_line(file, fields["byte"]):
                    break
                marks.append(_Mark(**fields))
                good += len(raw)
        os.truncate(self._index, good)
        return marks


def _begins_line(file: BinaryIO, byte: int) -> bool:
    file.seek(byte - 1)
    return file.read(1) == b"\n"


def _presentable(message: str) -> str:
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]} … [cut: {len(message):,} characters]"
    return message if message.isascii() else message.encode("utf-8", "replace").decode()


def _parse(raw: bytes) -> dict[str, Any] | None:
    """None for a line that is not whole: a crash tore it, or a power cut left zeros."""
    try:
        record: dict[str, Any] = json.loads(raw)
    except ValueError:
        return None
    return record if raw.endswith(b"\n") else None


def _record(line: Line, source: str, seq: int) -> str:
    fields = {"timestamp": line["timestamp"], "message": line["message"], "source": source, "seq": seq}
    return json.dumps(fields, ensure_ascii=False) + "\n"

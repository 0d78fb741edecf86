"""The log lines of one job on disk: append-only, addressed by offset (the line's number, from 0).

    <job dir>/log.ndjson   one JSON object a line: timestamp, message, source, seq
    <job dir>/log.index    marks, one JSON object a line, about every 1000 lines: line number `offset` begins at `byte`,
                           and how many lines each source had written by then

The index makes it cheap to read from any offset and to reopen the log. A mark is written after the lines before it. The
index may be deleted at any time; the file is then read once from its start.

Lines reach the operating system before `append` returns, so they survive the death of any process. They are not
fsynced, because an fsync for each batch would tie the training loop's output to the speed of the disk. So a power cut
may take lines of the last seconds (never an event). Where it took them from the middle of the file, a read returns one
line that says so. The lines after them keep their offsets if a mark follows; otherwise the number of lost lines is
unknown.
"""

import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypedDict

MAX_MESSAGE = 16_384
"""Longer messages are cut to this many characters, with a note that says how long they were."""
_MARK_LINES = 1000
_MARK_BYTES = 256 * 1024
logger = logging.getLogger("tunewright.logs")


class Line(TypedDict):
    """One log line, as the API shows it."""

    message: str
    timestamp: str


class _Record(NamedTuple):
    line: Line
    source: str
    seq: int


class _Mark(NamedTuple):
    offset: int
    byte: int
    sources: dict[str, int]


class _Found(NamedTuple):
    """A line of the file, the offset of the one after it, and the bytes it takes."""

    line: Line
    next: int
    size: int


class Spool:
    """One job's lines. `append` calls must not overlap; reads may run in other threads meanwhile."""

    def __init__(self, directory: Path) -> None:
        """Opens what is there. What follows the last whole line is cut off: a line that a crash tore was not
        acknowledged, and a power cut may leave zeros."""
        self._file = directory / "log.ndjson"
        self._index = directory / "log.index"
        self.lines = 0
        """Lines written: the offset of the next one."""
        self._bytes = 0
        self._sources: dict[str, int] = {}
        self._offsets = [0]  # of the marked lines ...
        self._starts = [0]  # ... and the bytes they begin at
        self._reported: set[int] = set()
        """Gaps that are in the operator's log, by the offset after them."""
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

    def read(self, first: int, limit: int, max_bytes: int) -> tuple[list[Line], int]:
        """Up to `limit` lines from offset `first` on, as many as fit into `max_bytes` of the file but at least one; and
        the offset after them. One line stands for each run of lines that the file has lost, and says so."""
        lines: list[Line] = []
        after = first
        read = 0
        for found in self._found(first):
            read += found.size
            if lines and read > max_bytes:
                break
            lines.append(found.line)
            after = found.next
            if len(lines) == limit:
                break
        return lines, after

    def _found(self, first: int) -> Iterator[_Found]:
        """The lines that end after offset `first`, one stretch between two marks at a time."""
        mark = bisect_right(self._offsets, first) - 1
        end, end_byte = self.lines, self._bytes  # in this order: never fewer bytes than lines
        offsets, starts = [*self._offsets[mark:], end], [*self._starts[mark:], end_byte]
        with self._file.open("rb") as file:
            file.seek(starts[0])
            for number in range(len(offsets) - 1):
                begin, count = offsets[number], offsets[number + 1] - offsets[number]
                raws = file.read(max(starts[number + 1] - starts[number], 0)).split(b"\n")
                if not raws[-1]:
                    del raws[-1]
                missing = max(count - len(raws), 0)
                skipped = 0 if missing else max(first - begin, 0)
                for found in self._parsed(raws[skipped:count], begin + skipped, missing):
                    if found.next > first:
                        yield found

    def _parsed(self, raws: Sequence[bytes], offset: int, missing: int) -> Iterator[_Found]:
        """The lines of a stretch that begins at `offset`. `missing`: how many more lines it had than `raws`; they are
        taken to have been at the first place that can't be read."""
        lost = size = 0
        line: Line | None = None
        for raw in raws:
            size += len(raw) + 1
            record = _record_in(raw)
            if record is None:
                lost += 1 + missing
                missing = 0
                continue
            line = record.line
            if lost:
                offset += lost
                yield _Found(self._gap(lost, offset, line), offset, 0)
                lost = 0
            offset += 1
            yield _Found(line, offset, size)
            size = 0
        if lost + missing:
            offset += lost + missing
            yield _Found(self._gap(lost + missing, offset, line), offset, size)

    def _gap(self, lost: int, after: int, near: Line | None) -> Line:
        """What stands for `lost` lines before offset `after`; `near` is the line next to them, if any is left."""
        if after not in self._reported:
            self._reported.add(after)
            logger.warning("%s: lines are lost, at least %d before line %d", self._file, lost, after)
        if near is not None:
            timestamp = near["timestamp"]
        else:
            timestamp = datetime.fromtimestamp(self._file.stat().st_mtime, UTC).isoformat()
        message = f"[lines of the log are lost here, at least {lost:,}: its file is damaged]"
        return {"message": message, "timestamp": timestamp}

    def _write(self, data: bytes) -> None:
        file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.write(file, data[written:])
        finally:
            os.close(file)
        self._bytes += len(data)

    def _mark_is_due(self) -> bool:
        return self.lines - self._offsets[-1] >= _MARK_LINES or self._bytes - self._starts[-1] >= _MARK_BYTES

    def _mark_now_and_then(self) -> None:
        if not self._mark_is_due():
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
            lines = read = 0
            for raw in file:
                lines += 1
                read += len(raw)
                record = _record_in(raw)
                if record is None or not raw.endswith(b"\n"):
                    continue  # to be cut off, unless a whole line follows
                self._sources[record.source] = record.seq + 1
                self.lines += lines
                self._bytes += read
                lines = read = 0
                if self._mark_is_due():
                    self._remember(_Mark(self.lines, self._bytes, self._sources))
        if self._bytes < size:
            os.truncate(self._file, self._bytes)

    def _marks(self) -> list[_Mark]:
        """The marks of the index that lead to the beginning of a line: a power cut may have taken what others lead to,
        or the marks themselves. The index is cut off after the last good one."""
        if not self._index.exists():
            return []
        marks: list[_Mark] = []
        read = good = 0
        with self._index.open("rb") as index, self._file.open("rb") as file:
            for raw in index:
                read += len(raw)
                mark = _mark_in(raw)
                if mark is not None and raw.endswith(b"\n") and _begins_line(file, mark.byte):
                    marks.append(mark)
                    good = read
        os.truncate(self._index, good)
        return marks


def _begins_line(file: BinaryIO, byte: int) -> bool:
    file.seek(byte - 1)
    return file.read(1) == b"\n"


def _presentable(message: str) -> str:
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]} … [cut: {len(message):,} characters]"
    return message if message.isascii() else message.encode("utf-8", "replace").decode()


def _record_in(raw: bytes) -> _Record | None:
    """A line of the file; None where a crash tore it, or a power cut left zeros."""
    match _json(raw):
        case {"message": str(message), "timestamp": str(timestamp), "source": str(source), "seq": int(seq)}:
            return _Record({"message": message, "timestamp": timestamp}, source, seq)
    return None


def _mark_in(raw: bytes) -> _Mark | None:
    match _json(raw):
        case {"offset": int(offset), "byte": int(byte), "sources": dict(sources)} if byte > 0:
            return _Mark(offset, byte, sources)
    return None


def _json(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _record(line: Line, source: str, seq: int) -> str:
    fields = {"timestamp": line["timestamp"], "message": line["message"], "source": source, "seq": seq}
    return json.dumps(fields, ensure_ascii=False) + "\n"

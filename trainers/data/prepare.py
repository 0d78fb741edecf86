"""Validates a data file and tokenises it to disk, before any accelerator is taken.

Every row is read once, as a stream; memory depends on the longest row, not on the size of the file. While one batch is
tokenised on all cores, the next one is parsed and rendered.
"""

import ctypes
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from events.facts import DataReport, LineError
from trainers.data.chat import ChatTokenizer, Encoded, Rendered
from trainers.data.dataset import MASK, MASK_TYPE, OFFSET_TYPE, OFFSETS, REPORT, TOKEN_TYPE, TOKENS
from trainers.data.dialog import RowError, parse_row
from trainers.data.source import data_size, open_lines
from trainers.errors import UserError

_BATCH_ROWS = 512
_BATCH_CHARS = 1 << 18
_LONG_ROW_CHARS = _BATCH_CHARS // 4
_ERRORS_KEPT = 20
_PROGRESS_S = 5.0

Progress = Callable[[str], None]
_Row = tuple[int, Rendered | RowError]
"""A line number, and what became of the line."""


class DataInvalid(UserError):
    """More rows are invalid than the job allows, or all of them are. `report` has the first ones with line numbers."""

    def __init__(self, report: DataReport, message: str) -> None:
        super().__init__("invalid_data", message)
        self.report = report

    def __reduce__(self) -> tuple[type["DataInvalid"], tuple[DataReport, str]]:  # type: ignore[override]
        return type(self), (self.report, self.error.message)


def prepare(
    uri: str,
    tokenizer: ChatTokenizer,
    *,
    max_seq_len: int,
    out_dir: Path,
    max_invalid_fraction: float = 0.0,
    progress: Progress,
) -> DataReport:
    """Reads every row of the checked `uri` and writes the valid ones to `out_dir` for `TokenisedDataset`.

    A row longer than `max_seq_len` tokens loses its end. `progress` gets a line for people every few seconds, called on
    this thread. `out_dir` appears only when it is complete; where it is already there for the same `uri` and
    `max_seq_len`, it is kept as it is and its report returned: a resumed job goes on with the data it started with.
    Raises DataInvalid when more than `max_invalid_fraction` of the rows (or all of them) are invalid, UserError and
    InfrastructureError as `open_lines` does; then nothing is left on disk.
    """
    if (finished := _finished(out_dir, uri, max_seq_len)) is not None:
        return finished
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        with _Writer(scratch) as writer:
            tally = _Tally(uri, max_seq_len)
            for line, row in _encoded(uri, tokenizer, _Meter(data_size(uri), progress)):
                try:
                    writer.append(*tally.admit(row))
                except RowError as error:
                    tally.refuse(line, str(error))
        report = tally.report()
        _judge(report, max_invalid_fraction)
        (scratch / REPORT).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        shutil.rmtree(out_dir, ignore_errors=True)
        scratch.rename(out_dir)
        for left_by_a_killed_run in out_dir.parent.glob(f".{out_dir.name}-*"):
            shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return report


def _finished(out_dir: Path, uri: str, max_seq_len: int) -> DataReport | None:
    file = out_dir / REPORT
    if not file.is_file():
        return None
    report = DataReport.model_validate_json(file.read_bytes())
    return report if (report.uri, report.max_seq_len) == (uri, max_seq_len) else None


def _judge(report: DataReport, max_invalid_fraction: float) -> None:
    total = report.rows + report.invalid_rows
    if total == 0:
        raise UserError("data_empty", f"{report.uri} has only blank lines")
    if report.rows and report.invalid_rows <= max_invalid_fraction * total:
        return
    first = report.errors[0]
    allowed = f" ({max_invalid_fraction:.2%} are allowed)" if max_invalid_fraction and report.rows else ""
    verb = "row is" if total == 1 else "rows are"
    raise DataInvalid(
        report,
        f"{report.invalid_rows} of {total} {verb} invalid{allowed}; the first is line {first.line}: {first.message}",
    )


def _encoded(uri: str, tokenizer: ChatTokenizer, meter: "_Meter") -> Iterator[tuple[int, Encoded | RowError]]:
    """Every row of the file in order, tokenised one batch ahead of the caller."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise") as pool:
        ahead: Future[list[tuple[int, Encoded | RowError]]] | None = None
        for batch in _batches(uri, tokenizer, meter):
            behind, ahead = ahead, pool.submit(_encode_batch, tokenizer, batch)
            yield from behind.result() if behind else ()
        yield from ahead.result() if ahead else ()


def _encode_batch(tokenizer: ChatTokenizer, batch: list[_Row]) -> list[tuple[int, Encoded | RowError]]:
    rendered = [row for _, row in batch if isinstance(row, Rendered)]
    encoded = iter(tokenizer.encode_rendered(rendered))
    if any(len(row.text) >= _LONG_ROW_CHARS for row in rendered):
        _give_memory_back()
    return [(line, next(encoded) if isinstance(row, Rendered) else row) for line, row in batch]


def _give_memory_back() -> None:
    """Returns freed memory to the system, where the C library can.

    glibc keeps what a long row took, scattered over the arenas of the threads: row after row the process would grow.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _batches(uri: str, tokenizer: ChatTokenizer, meter: "_Meter") -> Iterator[list[_Row]]:
    """Parsed and rendered rows, in batches small enough to be in memory twice."""
    batch: list[_Row] = []
    chars = 0
    for line, raw in open_lines(uri):
        row = _read(raw, tokenizer)
        batch.append((line, row))
        chars += len(row.text) if isinstance(row, Rendered) else 0
        meter.count(len(raw))
        if len(batch) == _BATCH_ROWS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _read(raw: bytes, tokenizer: ChatTokenizer) -> Rendered | RowError:
    try:
        return tokenizer.locate(parse_row(raw))
    except RowError as error:
        return error


class _Meter:
    """Says how far reading is, at most every few seconds. `size`: bytes of the file, None if not known."""

    def __init__(self, size: int | None, progress: Progress) -> None:
        self._size, self._progress = size, progress
        self._rows = self._bytes = 0
        self._started = self._said = time.monotonic()

    def count(self, row_bytes: int) -> None:
        self._rows += 1
        self._bytes += row_bytes + 1
        now = time.monotonic()
        if now - self._said >= _PROGRESS_S:
            self._said = now
            part = f" ({min(self._bytes / self._size, 1):.0%} of the file)" if self._size else ""
            rate = self._rows / (now - self._started)
            self._progress(f"read {self._rows:,} rows{part}, {rate:,.0f} rows/s")


@dataclass(slots=True)
class _Tally:
    """Decides on each tokenised row, and counts."""

    uri: str
    max_seq_len: int
    rows: int = 0
    invalid: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    errors: list[LineError] = field(default_factory=list)

    def admit(self, row: Encoded | RowError) -> Encoded:
        """The row as it will be trained on. Raises RowError for one that can't be."""
        if isinstance(row, RowError):
            raise row
        tokens, mask = row
        mask[:1] = False  # nothing predicts the first token
        length = len(tokens)
        kept = int(mask[: self.max_seq_len].sum())
        if kept == 0:
            raise RowError(self._nothing_left(mask))
        self.rows += 1
        self.trained += kept
        self.tokens += min(length, self.max_seq_len)
        self.truncated += length > self.max_seq_len
        self.lengths[1 << (length - 1).bit_length()] += 1
        return tokens[: self.max_seq_len], mask[: self.max_seq_len]

    def refuse(self, line: int, message: str) -> None:
        self.invalid += 1
        if len(self.errors) < _ERRORS_KEPT:
            self.errors.append(LineError(line=line, message=message))

    def report(self) -> DataReport:
        return DataReport(
            uri=self.uri,
            rows=self.rows,
            invalid_rows=self.invalid,
            tokens=self.tokens,
            trained_tokens=self.trained,
            truncated_rows=self.truncated,
            max_seq_len=self.max_seq_len,
            length_histogram={str(bound): self.lengths[bound] for bound in sorted(self.lengths)},
            errors=self.errors,
        )

    def _nothing_left(self, mask: NDArray[np.bool_]) -> str:
        if not mask.any():
            return "nothing to train on: the messages to train on are empty"
        first = int(mask.argmax()) + 1
        return (
            f"truncation leaves nothing to train on: the first trained token is at {first}, "
            f"max_seq_len is {self.max_seq_len}"
        )


class _Writer:
    """Appends rows to the three binary files; they are on disk when the context ends."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()

    def __enter__(self) -> "_Writer":
        self._tokens, self._mask, self._offsets = (self._open(name) for name in (TOKENS, MASK, OFFSETS))
        self._end = 0
        _write(self._offsets, [0], OFFSET_TYPE)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def append(self, tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> None:
        self._end += len(tokens)
        _write(self._tokens, tokens, TOKEN_TYPE)
        _write(self._mask, mask, MASK_TYPE)
        _write(self._offsets, [self._end], OFFSET_TYPE)

    def _open(self, name: str) -> BinaryIO:
        file = self._stack.enter_context((self._directory / name).open("wb", buffering=1 << 20))
        self._stack.callback(_sync, file)
        return file


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write(file: BinaryIO, values: NDArray[np.generic] | list[int], dtype: DTypeLike) -> None:
    file.write(np.asarray(values).astype(dtype, copy=False).tobytes())

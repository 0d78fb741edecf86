"""Validates a data file and tokenises it to disk, before any accelerator is taken.

Rows are read as a stream: memory depends on the longest row, not on the size of the file. Large files are tokenised on
several cores. Data that was tokenised before, for this or another job, is taken from the cache.
"""

import hashlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import numpy as np

from events.disk import sync_path, sync_tree
from events.facts import DataReport, LineError
from trainers.data.cache import DataCache
from trainers.data.chat import ChatTokenizer
from trainers.data.dataset import MASK, OFFSET_TYPE, OFFSETS, REPORT, TOKENS
from trainers.data.encode import ERRORS_KEPT, Chunk, Line, encode_lines
from trainers.data.source import content_digest, data_size, open_lines
from trainers.data.workers import encode_in_parallel, usable_cores
from trainers.errors import UserError

_CHUNK_ROWS = 512
_CHUNK_BYTES = 1 << 18
_WORTH_PROCESSES = 4 << 20  # bytes; tokenising a smaller file is faster than starting processes for it
_PROGRESS_S = 5.0

_SUGGESTION = (
    "fix the lines that the job's log lists (GET /fine_tuning/jobs/tail), or submit it through "
    "/fine_tuning/jobs/submit with extras.max_invalid_fraction, which allows some"
)

NO_END = (
    "the model's chat template doesn't end an assistant's turn with a token of its own, so the model won't learn to "
    "stop. Make the template write the tokenizer's eos_token there"
)
"""The warning if a tokenizer's `ends_turns` is false."""

Progress = Callable[[str], None]


class DataInvalid(UserError):
    """More rows are invalid than the job allows, or all are. `report` has the first ones with their line numbers."""

    def __init__(self, report: DataReport, message: str) -> None:
        super().__init__("invalid_data", message, line=report.errors[0].line, suggestion=_SUGGESTION)
        self.report = report


def bad_lines(report: DataReport) -> list[str]:
    """A message for each of the first bad lines, and the number of further ones."""
    told = [f"line {error.line}: {error.message}" for error in report.errors]
    more = report.invalid_rows - len(report.errors)
    return [*told, f"and {more} more lines"] if more else told


def hardly_meant(report: DataReport, tokenizer: ChatTokenizer, asked: int | None, taken: int) -> list[str]:
    """Warnings about rows that can be trained on, but probably not as intended. `asked`: the max_seq_len that the user
    set, if any; `taken`: the longest row that the model takes, in tokens."""
    told = []
    cut = f"{report.truncated_rows:,} of {report.rows:,} rows are cut off at {report.max_seq_len:,} tokens"
    if report.truncated_rows and asked is None and report.max_seq_len < taken:
        told.append(f"{cut}; set extras.max_seq_len to keep up to {taken:,} tokens of each")
    if report.truncated_rows and asked is not None and asked > taken:
        told.append(f"{cut}, which is all the model takes, though max_seq_len is {asked:,}")
    if report.partly_shown_rows:
        told.append(
            f"in {report.partly_shown_rows:,} of {report.rows:,} rows the model's chat template shows only part of a "
            "message to train on (it may drop reasoning); the rest isn't trained"
        )
    if report.unprompted_rows:
        told.append(
            f"in {report.unprompted_rows:,} of {report.rows:,} rows an answer to train on doesn't continue the model's "
            f"generation prompt, which ends in {tokenizer.cue!r}. Put the reasoning that it begins into the last "
            "answer of each row and train on that answer only (keep_loss), or start from a model whose chat template "
            "neither begins nor drops reasoning"
        )
    return told


def prepared(out_dir: Path, max_seq_len: int) -> DataReport | None:
    """The report of the data that `prepare` wrote to `out_dir`; None if there is none, or for another max_seq_len."""
    file = out_dir / REPORT
    if not file.is_file():
        return None
    report = DataReport.model_validate_json(file.read_bytes())
    return report if report.max_seq_len == max_seq_len else None


def prepare(
    uri: str,
    tokenizer: ChatTokenizer,
    *,
    max_seq_len: int,
    pairs: bool = False,
    out_dir: Path,
    cache: DataCache,
    max_invalid_fraction: float = 0.0,
    progress: Progress,
) -> DataReport:
    """Reads every row of `uri`, which has been checked, and writes the valid ones to `out_dir` for `TokenisedDataset`.

    `pairs`: the rows are preferences; each becomes two rows, chosen and rejected, and the report counts it as one. Rows
    are cut off after `max_seq_len` tokens. `progress` is called on this thread with a line for users every few seconds.
    `out_dir` appears, or is replaced, only when it is complete. If `cache` has the same data, tokenised in the same
    way, that is used; if not, it is added. Raises DataInvalid if more than `max_invalid_fraction` of the rows (or all
    of them) are invalid, UserError `data_changed` if the file changed meanwhile, and UserError and InfrastructureError
    as `open_lines` and `encode_in_parallel` do; `out_dir` is then unchanged.
    """
    digest = content_digest(uri)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        cache.fetch(
            _key(digest, tokenizer, max_seq_len, pairs),
            partial(_tokenise, uri, digest, tokenizer, max_seq_len, pairs, progress),
            scratch,
            lambda _: progress("another job is tokenising the same data; waiting for it"),
        )
        # The cached report names the URI that was tokenised first.
        report = DataReport.model_validate_json((scratch / REPORT).read_bytes()).model_copy(update={"uri": uri})
        judge(report, max_invalid_fraction)
        (scratch / REPORT).unlink()  # a hard link: writing into it would change the cache's
        _write_report(report, scratch)
        scratch.chmod(0o755)
        sync_tree(scratch)  # files may be copies of the cache's
        shutil.rmtree(out_dir, ignore_errors=True)
        scratch.rename(out_dir)
        sync_path(out_dir.parent)
        for left_by_a_killed_run in out_dir.parent.glob(f".{out_dir.name}-*"):
            shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return report


def _key(digest: str, tokenizer: ChatTokenizer, max_seq_len: int, pairs: bool) -> str:
    """A hash of everything that the tokenised data depends on: the file, the tokenizer with its template, max_seq_len,
    whether rows are pairs, and the code that reads, renders and tokenises."""
    depends_on = f"{digest} {tokenizer.fingerprint} {max_seq_len} {pairs} {_code()}"
    return hashlib.sha256(depends_on.encode()).hexdigest()[:40]


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    versions = [metadata.version(name) for name in ("jinja2", "numpy", "pydantic", "tokenizers")]
    return f"{digest.hexdigest()} {versions}"


def _tokenise(
    uri: str,
    digest: str,
    tokenizer: ChatTokenizer,
    max_seq_len: int,
    pairs: bool,
    progress: Progress,
    directory: Path,
) -> None:
    """Writes the valid rows of `uri` to `directory`, with a report. Raises if there are none, or if the content doesn't
    match `digest` any more."""
    size = data_size(uri)
    read = hashlib.sha256()
    chunks = _chunks(open_lines(uri, read), _Meter(size, progress))
    tally = Tally()
    with _Writer(directory) as writer:
        if usable_cores() > 1 and (size is None or size >= _WORTH_PROCESSES):
            encoded = encode_in_parallel(chunks, tokenizer, max_seq_len, pairs)
        else:
            encoded = (encode_lines(tokenizer, max_seq_len, lines, pairs) for lines in chunks)
        for chunk in encoded:
            tally.add(chunk)
            writer.append(chunk)
    if read.hexdigest() != digest:
        raise UserError(
            "data_changed",
            f"{uri} changed while it was read",
            suggestion="submit the job again when it is complete",
            retryable=True,
        )
    report = tally.report(uri, max_seq_len)
    judge(report, max_invalid_fraction=1.0)
    _write_report(report, directory)


def judge(report: DataReport, max_invalid_fraction: float) -> None:
    """Raises DataInvalid if more than `max_invalid_fraction` of the rows are invalid, or all of them; UserError
    `data_empty` if there are no rows."""
    total = report.rows + report.invalid_rows
    if total == 0:
        raise UserError(
            "data_empty", f"{report.uri} has only blank lines", suggestion="write one JSON object per line into it"
        )
    if report.rows and report.invalid_rows <= max_invalid_fraction * total:
        return
    first = report.errors[0]
    allowed = f" ({max_invalid_fraction:.2%} are allowed)" if max_invalid_fraction and report.rows else ""
    verb = "row is" if total == 1 else "rows are"
    raise DataInvalid(
        report,
        f"{report.invalid_rows} of {total} {verb} invalid{allowed}; the first is line {first.line}: {first.message}.",
    )


def _chunks(lines: Iterator[Line], meter: "_Meter") -> Iterator[list[Line]]:
    """`lines` in chunks, small enough to hold several per core in memory. A long line is a chunk by itself."""
    chunk: list[Line] = []
    size = 0
    for line, raw in lines:
        meter.count(len(raw))
        if chunk and (len(chunk) == _CHUNK_ROWS or size + len(raw) > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append((line, raw))
        size += len(raw)
    if chunk:
        yield chunk


class _Meter:
    """Reports the progress of reading, at most every few seconds. `size`: bytes of the file, None if not known."""

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
class Tally:
    """The sum of chunks, for the report."""

    rows: int = 0
    invalid: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    partly_shown: int = 0
    unprompted: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    errors: list[LineError] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.rows += chunk.valid
        self.invalid += chunk.invalid
        self.tokens += sum(chunk.lengths)
        self.trained += chunk.trained
        self.truncated += chunk.truncated
        self.partly_shown += chunk.partly_shown
        self.unprompted += chunk.unprompted
        self.histogram.update(chunk.histogram)
        self.errors += chunk.errors[: ERRORS_KEPT - len(self.errors)]

    def report(self, uri: str, max_seq_len: int) -> DataReport:
        return DataReport(
            uri=uri,
            rows=self.rows,
            invalid_rows=self.invalid,
            tokens=self.tokens,
            trained_tokens=self.trained,
            truncated_rows=self.truncated,
            partly_shown_rows=self.partly_shown,
            unprompted_rows=self.unprompted,
            max_seq_len=max_seq_len,
            length_histogram={str(bound): self.histogram[bound] for bound in sorted(self.histogram)},
            errors=self.errors,
        )


class _Writer:
    """A context manager that appends rows to the three binary files; they are complete when it ends."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()

    def __enter__(self) -> "_Writer":
        self._tokens, self._mask, self._offsets = (self._open(name) for name in (TOKENS, MASK, OFFSETS))
        self._end = 0
        self._offsets.write(np.zeros(1, dtype=OFFSET_TYPE).tobytes())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def append(self, chunk: Chunk) -> None:
        ends = self._end + np.cumsum(chunk.lengths, dtype=OFFSET_TYPE)
        self._tokens.write(chunk.tokens)
        self._mask.write(chunk.mask)
        self._offsets.write(ends.tobytes())
        self._end += sum(chunk.lengths)

    def _open(self, name: str) -> BinaryIO:
        return self._stack.enter_context((self._directory / name).open("wb", buffering=1 << 20))


def _write_report(report: DataReport, directory: Path) -> None:
    (directory / REPORT).write_bytes(report.model_dump_json(indent=2).encode() + b"\n")

"""Estimates what a job would take: rows, tokens, steps and memory, with a preview of the first rows.

An estimate runs in its own process, so that tokenising delays no request, and a time-out can end it. `Estimator` starts
`python -m trainers.estimate`, which reads an `Asked` as JSON from its standard input and writes an `Answer` to its
standard output.

A file of up to `SAMPLE_BYTES` is read and encoded whole, by the same code as in the job's validation, so the counts are
those of its report. Of a larger file, a random sample of lines of about that size is encoded (the same lines every
time), and the counts are extrapolated. If reading takes longer than `READ_S`, the counts are extrapolated from what was
read.
"""

import asyncio
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from events.config import optional
from events.facts import DataReport, JobError, Resources
from trainers.data.chat import ChatTokenizer
from trainers.data.dataset import MASK_TYPE, TOKEN_TYPE
from trainers.data.encode import ERRORS_KEPT, Chunk, Line, encode_lines
from trainers.data.prepare import NO_END, DataInvalid, Tally, bad_lines, hardly_meant, judge
from trainers.data.source import check_data_uri, data_size, open_lines
from trainers.errors import ConfigProblems, InfrastructureError, JobProblem, Problem, UserError, storage_errors
from trainers.models.architecture import Architecture, inspect_model_dir
from trainers.models.layout import numbers_of
from trainers.models.resolve import resolve_model
from trainers.planning.fitting import MARGIN, recomputing_if_needed
from trainers.planning.memory import Memory, memory_of
from trainers.planning.plan import Plan, step_items
from trainers.planning.precision import Device
from trainers.planning.suitability import check_suitable, longest_row
from trainers.priority import give_way
from trainers.settings import Settings

SAMPLE_BYTES = 8 << 20
READ_S = 20.0
LIMIT_S = 60.0
"""Time-out of an estimate: its model or data can't be read at a useful speed."""
PREVIEW_ROWS = 3
PREVIEW_TOKENS = 1024
"""Tokens that are shown of each previewed row."""
PREVIEWED_AMONG = 100
"""Rows for the preview are taken from this many lines at the beginning of the file."""
AT_A_TIME = 2
WAITING = 16
"""Estimates that may wait for their turn; more are refused."""
_CHUNK_BYTES = 1 << 18
_SEED = 0
_COUNTS = ("rows", "invalid_rows", "tokens", "trained_tokens", "truncated_rows")
logger = logging.getLogger("tunewright.estimate")


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True)


class PreviewToken(_Wire):
    """One token."""

    text: str = Field(description="Empty if its character is completed by a later token.")
    id: int
    trained: bool = Field(description="Whether predicting it counts in the loss.")


class PreviewRow(_Wire):
    """A row of the data as it will be trained on: template applied, truncated, with its loss mask."""

    line: int = Field(description="Line number in the file, from 1.")
    side: Literal["chosen", "rejected"] | None = optional("With DPO: which of the row's two answers this is.")
    n_tokens: int = Field(description="Tokens in the row, after truncation.")
    truncated: bool = Field(description="Whether its end is cut off at `max_seq_len`.")
    tokens: list[PreviewToken] = Field(description=f"The first {PREVIEW_TOKENS} tokens.")


class DataEstimate(_Wire):
    """One data file. Counts are of the whole file: exact, or with `sampled` extrapolated."""

    rows: int = Field(description="Rows that will be trained on (or evaluated); a pair of preferences counts as one.")
    invalid_rows: int
    tokens: int = Field(description="Tokens after truncation.")
    trained_tokens: int = Field(description="Tokens that carry loss, after truncation.")
    truncated_rows: int
    truncated_lines: list[int] = Field(description="Line numbers of the first 20 truncated rows that were seen.")
    max_seq_len: int = Field(description="Longest row allowed, in tokens.")
    longest_row: int = Field(description="Tokens of the longest row that was seen, after truncation.")
    sampled: bool = Field(
        description="Whether only some of the rows were looked at, and the counts extrapolated from them."
    )
    rows_seen: int = Field(description="Rows that were looked at, invalid ones included.")


class MemoryEstimate(Memory):
    """What each worker will need, and what it can have."""

    available_bytes: int | None = optional(
        "What a worker can have on the roomiest node. Absent if unknown, as on GPUs."
    )
    fits: bool | None = optional(
        f"Whether that is enough. A job is refused only if it needs more than {MARGIN} times as much as there is."
    )


class TimeEstimate(_Wire):
    """How long the job will train, not counting the time it waits and starts."""

    seconds: float
    tokens_per_second: float = Field(description="All workers together; `seconds` is computed from it.")
    basis: str = Field(
        description="How this is known: `measured on 3 jobs` with the same model, method, type and workers, or what "
        "was assumed because there are none (always for `packed` jobs)."
    )


class Estimate(_Wire):
    """What a job would take. Nothing runs, and nothing is recorded."""

    data: DataEstimate
    validation_data: DataEstimate | None = optional("Present if the request names such a file.")
    steps: int = Field(description="Optimizer steps.")
    warnings: list[str] = Field(default=[], description="Settings and rows that are allowed, but probably a mistake.")
    resources: Resources
    memory: MemoryEstimate
    time: TimeEstimate
    preview: list[PreviewRow] = Field(description=f"The first {PREVIEW_ROWS} valid rows of the training data.")


class Asked(_Wire):
    """The input of an estimate. `worker_bytes`: memory that a worker may take; `share_bytes`: memory that it can count
    on while other jobs run on its node. None: not known."""

    plan: Plan
    device: Device
    worker_bytes: int | None = None
    share_bytes: int | None = None


class Found(_Wire):
    """An Estimate without its time, which the API computes from earlier jobs."""

    data: DataEstimate
    validation_data: DataEstimate | None = None
    steps: int
    warnings: list[str] = []
    memory: MemoryEstimate
    preview: list[PreviewRow]
    tokens_a_step: float
    flops_per_token: float

    def estimate(self, resources: Resources, time: TimeEstimate) -> Estimate:
        return Estimate(
            data=self.data,
            validation_data=self.validation_data,
            steps=self.steps,
            warnings=self.warnings,
            resources=resources,
            memory=self.memory,
            time=time,
            preview=self.preview,
        )


class Answer(_Wire):
    """The output of the process: what it found, or everything that is wrong with the request, or why it failed."""

    found: Found | None = None
    problems: list[tuple[str | None, str, str]] = []
    error: JobError | None = None

    def result(self) -> Found:
        """What was found. Raises ConfigProblems or JobProblem if that is the answer."""
        if self.problems:
            raise ConfigProblems([Problem(*problem) for problem in self.problems])
        if self.error is not None:
            raise JobProblem.of(self.error)
        assert self.found is not None  # noqa: S101  -- one of the three
        return self.found


class Estimator:
    """Runs estimates, up to `AT_A_TIME` in parallel, each in a process of its own with a time-out."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = asyncio.Semaphore(AT_A_TIME)
        self._here = 0

    async def find(self, asked: Asked) -> Found:
        """Raises ConfigProblems for everything that is wrong with the model and the data, JobProblem if they can't be
        read, and InfrastructureError `estimate_failed` or `too_many_estimates`."""
        if self._here >= AT_A_TIME + WAITING:
            raise InfrastructureError(
                "too_many_estimates", f"{self._here} estimates are running or waiting already", suggestion="try again"
            )
        self._here += 1
        try:
            async with self._places:
                return (await self._run(asked)).result()
        finally:
            self._here -= 1

    async def _run(self, asked: Asked) -> Answer:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        process = subprocess.Popen(  # noqa: ASYNC220  -- starting takes a millisecond; a thread waits for the end
            [sys.executable, "-m", "trainers.estimate"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | self._settings.as_env() | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
        try:
            out, _ = await asyncio.to_thread(process.communicate, asked.model_dump_json().encode(), LIMIT_S)
        except subprocess.TimeoutExpired:
            why = f"it took longer than {LIMIT_S:g} s"
        else:
            if process.returncode == 0:
                return Answer.model_validate_json(out)
            why = f"its process ended with exit code {process.returncode}"
        finally:
            process.kill()  # also if this coroutine is cancelled; does nothing if the process has ended
        raise InfrastructureError(
            "estimate_failed",
            f"the estimate was given up: {why}",
            suggestion="try again, or submit the job: its own validation has no time limit",
        )


def main() -> None:
    give_way()
    logging.basicConfig(level=logging.WARNING)
    asked = Asked.model_validate_json(sys.stdin.buffer.read())
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints must not get into the answer
    out.write(answer(asked, Settings()).model_dump_json())
    out.close()


def answer(asked: Asked, settings: Settings) -> Answer:
    """Makes the estimate, in the process that `Estimator` started."""
    try:
        with storage_errors():
            return Answer(found=_find(asked, settings))
    except ConfigProblems as refused:
        return Answer(problems=[(problem.param, problem.message, problem.code) for problem in refused.problems])
    except JobProblem as problem:
        return Answer(error=problem.error)


def _find(asked: Asked, settings: Settings) -> Found:
    plan = asked.plan
    model_dir = resolve_model(plan.model, settings, logger.info, weights=False)
    arch = inspect_model_dir(model_dir, weights=any(model_dir.glob("*.safetensors")))
    check_suitable(plan, arch)
    tokenizer, max_seq_len = ChatTokenizer.from_dir(model_dir), longest_row(plan, arch)

    def read(param: str, uri: str) -> Sample:
        try:
            return read_sample(check_data_uri(uri, settings), tokenizer, max_seq_len, plan.pairs)
        except JobProblem as problem:
            raise problem.placed(param=param) from None

    samples = {"data": read("data", plan.data)}
    if plan.validation_data:
        samples["validation_data"] = read("validation_data", plan.validation_data)
    problems = [problem for param, sample in samples.items() for problem in _problems(param, sample, plan)]
    if problems:
        raise ConfigProblems(problems)

    from trainers.training.batches import Progress  # imports torch, which takes seconds: only for a valid request
    from trainers.training.load import build_schedule, load_of
    from trainers.training.optimization import only_warm_up

    train = samples["data"]
    plan = recomputing_if_needed(plan, arch, train.lengths, asked.share_bytes)
    there = asked.worker_bytes
    memory = memory_of(plan, arch, load_of(plan, arch, train), asked.device, there)
    fits = None if there is None else memory.peak_bytes <= there
    valid = samples.get("validation_data")
    schedule = build_schedule(plan, train, rank=0, world=plan.workers)
    items = round(schedule.n_items * train.scale)
    steps = schedule.total_steps(Progress()) if train.scale == 1 else _steps(plan, items)
    warnings = [] if tokenizer.ends_turns else [NO_END]
    for param, sample in samples.items():
        told = hardly_meant(sample.whole(), tokenizer, plan.max_seq_len, arch.max_seq_len)
        warnings += [f"{getattr(plan, param)}: {warning}" for warning in told]
    if (warning := only_warm_up(plan, steps)) is not None:
        warnings.append(warning)
    return Found(
        data=train.counted(),
        validation_data=valid.counted() if valid else None,
        steps=steps,
        warnings=warnings,
        memory=MemoryEstimate(**memory.model_dump(), available_bytes=there, fits=fits),
        preview=train.preview,
        tokens_a_step=float(train.lengths.sum()) / schedule.n_items * min(step_items(plan), items),
        flops_per_token=_flops_per_token(plan, arch),
    )


def _problems(param: str, sample: "Sample", plan: Plan) -> list[Problem]:
    try:
        judge(sample.report, plan.max_invalid_fraction)
    except DataInvalid as invalid:
        return [Problem(param, told, "invalid_data") for told in bad_lines(invalid.report)]
    except UserError as error:
        return [Problem(param, error.error.message, error.error.code)]
    return []


def _steps(plan: Plan, items: int) -> int:
    """Optimizer steps for about so many `items`, for a file of which only a sample was seen."""
    an_epoch = -(-items // step_items(plan))
    return plan.n_epochs * min(an_epoch, plan.max_steps_per_epoch or an_epoch)


def _flops_per_token(plan: Plan, arch: Architecture) -> float:
    """Floating-point operations for training on one token. For each weight: 2 in the forward pass, 2 for the gradient
    of the activations, 2 for that of the weight if it is trained, 2 to recompute the forward pass."""
    passes = 4 + (2 if plan.lora is None else 0) + (2 if plan.enable_activation_checkpointing else 0)
    return float(passes * numbers_of(arch))


class Sample:
    """Rows of a data file in memory, with the interface of `TokenisedDataset`, and what is known of the whole file."""

    def __init__(self, chunks: Sequence[Chunk], report: DataReport, *, seen: int, scale: float) -> None:
        """`seen`: number of lines that were encoded; `scale`: lines of the file for each of these."""
        self.report, self.seen, self.scale = report, seen, scale
        self.truncated_lines = [line for chunk in chunks for line in chunk.truncated_lines][:ERRORS_KEPT]
        self.lengths = np.array([length for chunk in chunks for length in chunk.lengths], dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._tokens = np.frombuffer(b"".join(chunk.tokens for chunk in chunks), dtype=TOKEN_TYPE)
        self._mask = np.frombuffer(b"".join(chunk.mask for chunk in chunks), dtype=MASK_TYPE)
        self.trained = np.array([int(self[row][1].sum()) for row in range(len(self))], dtype=np.int64)
        self.preview: list[PreviewRow] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        end = self._ends[index]
        rows = slice(end - self.lengths[index], end)
        return self._tokens[rows], self._mask[rows].view(np.bool_)

    def whole(self) -> DataReport:
        """The report of the whole file, extrapolated, except for errors and histogram."""
        counts = (*_COUNTS, "partly_shown_rows", "unprompted_rows")
        scaled = {name: round(getattr(self.report, name) * self.scale) for name in counts}
        return self.report.model_copy(update=scaled)

    def counted(self) -> DataEstimate:
        return DataEstimate(
            **self.whole().model_dump(include={*_COUNTS}),
            truncated_lines=self.truncated_lines,
            max_seq_len=self.report.max_seq_len,
            longest_row=int(self.lengths.max()),
            sampled=self.scale != 1,
            rows_seen=self.seen,
        )


def read_sample(uri: str, tokenizer: ChatTokenizer, max_seq_len: int, pairs: bool) -> Sample:
    """Reads and encodes `uri`, or a sample of it. `uri` has been checked. Raises as `open_lines` does."""
    size, began = data_size(uri), time.monotonic()
    share = 1.0 if size is None else min(1.0, SAMPLE_BYTES / max(size, 1))
    drawn = random.Random(_SEED)  # noqa: S311  -- a sample, no secret
    tally, chunks, preview = Tally(), list[Chunk](), list[PreviewRow]()
    waiting: list[Line] = []
    lines = seen = read = taken = gathered = 0
    ended = True

    def encode(some: list[Line]) -> Chunk:
        chunk = encode_lines(tokenizer, max_seq_len, some, pairs)
        tally.add(chunk)
        chunks.append(chunk)
        return chunk

    for number, raw in open_lines(uri):
        lines, read = lines + 1, read + len(raw) + 1
        if time.monotonic() - began > READ_S:
            ended = False
            break
        looked_at = lines <= PREVIEWED_AMONG and len(preview) < PREVIEW_ROWS
        if not looked_at and (taken > 2 * SAMPLE_BYTES or drawn.random() >= share):
            continue
        seen, taken, gathered = seen + 1, taken + len(raw), gathered + len(raw)
        if looked_at:
            preview += _previewed(encode([(number, raw)]), number, tokenizer, max_seq_len)
            continue
        waiting.append((number, raw))
        if gathered > _CHUNK_BYTES:
            encode(waiting)
            waiting, gathered = [], 0
    if waiting:
        encode(waiting)
    total = lines if ended or not size else max(lines, round(lines * size / read))
    sample = Sample(chunks, tally.report(uri, max_seq_len), seen=seen, scale=total / max(seen, 1))
    sample.preview = preview
    return sample


def _previewed(chunk: Chunk, line: int, tokenizer: ChatTokenizer, max_seq_len: int) -> list[PreviewRow]:
    """The previews of a chunk of one line: none if it is invalid, two with preferences."""
    tokens, mask = np.frombuffer(chunk.tokens, TOKEN_TYPE), np.frombuffer(chunk.mask, MASK_TYPE)
    rows, end = [], 0
    for number, length in enumerate(chunk.lengths):
        ids, trained = tokens[end : end + length].tolist(), mask[end : end + length].tolist()
        end += length
        shown = zip(tokenizer.texts(ids[:PREVIEW_TOKENS]), ids, trained, strict=False)
        rows.append(
            PreviewRow(
                line=line,
                side=(("chosen", "rejected")[number]) if len(chunk.lengths) > 1 else None,
                n_tokens=length,
                truncated=bool(chunk.truncated) and length == max_seq_len,
                tokens=[PreviewToken(text=text, id=id_, trained=bool(bit)) for text, id_, bit in shown],
            )
        )
    return rows


if __name__ == "__main__":
    main()

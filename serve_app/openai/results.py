"""Result files: a job's metrics by step, as CSV. They are made from the log each time they are read."""

import asyncio
import csv
import io
import math
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from events.decide import Refused
from events.facts import MetricsRecorded, StepMetrics
from events.job import FineTuningJob
from events.store import Recorded
from serve_app.backend import JobLog
from serve_app.openai.objects import OpenAIFile
from trainers.files import RESULTS_PREFIX

FILENAME = "step_metrics.csv"
TRAIN = {"train_loss": "loss", "train_mean_token_accuracy": "token_accuracy"}
VALID = {
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_token_accuracy",
    "full_valid_loss": "valid_loss",
    "full_valid_mean_token_accuracy": "valid_token_accuracy",
}
"""OpenAI's names of our metrics. An evaluation always covers the whole validation file, so it has both of OpenAI's
pairs of names."""
COLUMNS = ("step", "total_steps", *TRAIN, *VALID)
_PAGE = 100
"""Events per read. Unpickling them blocks the event loop: a thousand events with ten steps each took 0.2 s."""
_FORMAT = 1
"""Raise this when the CSV of the same metrics changes: sizes that were stored before don't count any more."""


def file_id(job_id: str) -> str:
    return f"{RESULTS_PREFIX}{job_id}"


def has_results(job: FineTuningJob) -> bool:
    """Whether the job is over and has recorded metrics."""
    return job.over and job.metrics is not None


def created_at(job: FineTuningJob) -> int:
    return int((job.finished_at or job.created).timestamp())


async def job_of(log: JobLog, name: str) -> FineTuningJob | None:
    """The job that the result file `name` belongs to; None if `name` is not a result file."""
    if not name.startswith(RESULTS_PREFIX):
        return None
    try:
        job = await log.job(name.removeprefix(RESULTS_PREFIX))
    except Refused as refused:
        if refused.code == "unknown_job":
            return None
        raise
    return job if has_results(job) else None


class Sizes:
    """Sizes of the result files that were listed before, in memory and on disk.

    Computing a size means reading the job's whole history: for a thousand jobs of 300 steps, 5 to 20 s. The file saves
    that when a replica is started again. It has a line for each job: `<job id> <time of its end> <size> bytes`. (A job
    may end again, with other metrics, after a backup of the event log was restored.) Several replicas may append to
    it, damaged lines are ignored, and without it sizes are computed again.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, int] = {}
        with suppress(OSError):
            text = file.read_text(errors="replace")
            for end, size in re.findall(r"^(\S+ \S+) (\d+) bytes$", text, re.MULTILINE):
                self._known[end] = int(size)

    async def of(self, log: JobLog, job: FineTuningJob) -> int:
        """The size of the result file of a job that is over."""
        end = f"{job.job_id} {(job.finished_at or job.created).isoformat()}"
        if end not in self._known:
            self._known[end] = len(await result_csv(log, job))
            await asyncio.to_thread(self._store, f"{end} {self._known[end]} bytes")
        return self._known[end]

    def _store(self, line: str) -> None:
        with suppress(OSError), self._file.open("a") as file:
            file.write(f"\n{line}")  # the line break comes first: a crash may have cut the last line short


@cache
def sizes_in(storage: Path) -> Sizes:
    """This process's sizes for the service in that storage directory. The first call reads them from disk."""
    return Sizes(storage / f"result-sizes-{_FORMAT}.txt")


async def result_file(log: JobLog, job: FineTuningJob, sizes: Sizes) -> OpenAIFile:
    return OpenAIFile(
        id=file_id(job.job_id),
        bytes=await sizes.of(log, job),
        created_at=created_at(job),
        filename=FILENAME,
        purpose="fine-tune-results",
    )


async def result_csv(log: JobLog, job: FineTuningJob) -> bytes:
    """The CSV, with one line for each step. If a step was repeated after an interruption, its last metrics count."""
    total = job.progress.total_steps if job.progress else None
    by_step: dict[int, dict[str, int | float | None]] = {}
    async for recorded in history(log, job.job_id):
        if isinstance(recorded.event, MetricsRecorded):
            for metrics in recorded.event.steps:
                row = by_step.setdefault(metrics.step, dict.fromkeys(COLUMNS))
                row |= {name: value for name, value in measured(metrics, total).items() if value is not None}
    return await asyncio.to_thread(_written, by_step)


def _written(by_step: dict[int, dict[str, int | float | None]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(by_step[step] for step in sorted(by_step))
    return text.getvalue().encode()


def measured(metrics: StepMetrics, total_steps: int | None) -> dict[str, int | float | None]:
    """The metrics by OpenAI's names. None for those that were not measured or are not finite."""
    values: dict[str, int | float | None] = {"step": metrics.step, "total_steps": total_steps}
    for name, ours in (TRAIN | VALID).items():
        values[name] = finite(getattr(metrics, ours))
    return values


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


async def history(log: JobLog, job_id: str) -> AsyncIterator[Recorded]:
    """All events of a job."""
    after = -1
    while batch := await log.read(job_id, after, _PAGE):
        for recorded in batch:
            yield recorded
        after = batch[-1].version

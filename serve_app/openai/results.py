"""Result files: a job's metrics by step, as CSV. They are derived from the log when they are read, so none is lost."""

import asyncio
import csv
import io
import math
from collections.abc import AsyncIterator

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
"""OpenAI's names of our metrics. An evaluation here is always of the whole file, so both of OpenAI's pairs are it."""
COLUMNS = ("step", "total_steps", *TRAIN, *VALID)
_sizes: dict[str, int] = {}
_PAGE = 100
"""Events that are read at a time. The event loop unpickles them, and does nothing else meanwhile: a thousand with ten
steps each took it 0.2 s."""


def file_id(job_id: str) -> str:
    return f"{RESULTS_PREFIX}{job_id}"


def has_results(job: FineTuningJob) -> bool:
    """Once it is over, if it has measured anything."""
    return job.over and job.metrics is not None


def created_at(job: FineTuningJob) -> int:
    return int((job.finished_at or job.created).timestamp())


async def job_of(log: JobLog, name: str) -> FineTuningJob | None:
    """The job whose result file that is; None where it is none."""
    if not name.startswith(RESULTS_PREFIX):
        return None
    try:
        job = await log.job(name.removeprefix(RESULTS_PREFIX))
    except Refused as refused:
        if refused.code == "unknown_job":
            return None
        raise
    return job if has_results(job) else None


async def result_file(log: JobLog, job: FineTuningJob) -> OpenAIFile:
    if job.job_id not in _sizes:  # it never changes: the job is over
        _sizes[job.job_id] = len(await result_csv(log, job))
    return OpenAIFile(
        id=file_id(job.job_id),
        bytes=_sizes[job.job_id],
        created_at=created_at(job),
        filename=FILENAME,
        purpose="fine-tune-results",
    )


async def result_csv(log: JobLog, job: FineTuningJob) -> bytes:
    """A line for each step. Steps that an interrupted run lost and the next one took again are there once."""
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
    """By OpenAI's names. None for what was not measured, or is no number."""
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

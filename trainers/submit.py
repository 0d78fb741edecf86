"""Submit one job from the command line and follow it to its end."""

import asyncio
import json
import logging
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import ray

from events.actors import NAMESPACE
from events.decide import Refused
from events.facts import CancelRequested, JobSubmitted
from events.ids import new_event_id, new_job_id
from events.job import FineTuningJob
from trainers.errors import ConfigProblems
from trainers.preflight import examine
from trainers.service import Service, start
from trainers.settings import Settings

SUCCEEDED, FAILED, REFUSED, CANCELLED = 0, 1, 2, 130
BATCH_LINES = 1000
WAIT_S = 5.0
LOCAL_FILES = ("data", "validation_data")


def submit_and_follow(path: Path, settings: Settings) -> int:
    """Print the job's log to stdout and what concerns the job itself to stderr.

    Returns 0 when the job succeeded, 1 when it failed, 2 when it was refused, 130 when it was cancelled.
    """
    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        _say(f"{path}: {error}")
        return REFUSED
    if not isinstance(document, dict):
        _say(f"{path}: must hold one JSON object, the body of POST /fine_tuning/jobs/submit")
        return REFUSED
    try:
        return asyncio.run(_submit_and_follow(document, settings))
    except (ConfigProblems, Refused) as refusal:
        _say(f"{path}: {refusal}")
        return REFUSED


async def _submit_and_follow(document: dict[str, Any], settings: Settings) -> int:
    service = start(settings)
    job_id = new_job_id()
    document = await asyncio.to_thread(_with_files_kept, document, settings.storage / "data" / job_id)
    examined = await asyncio.to_thread(examine, document, settings)
    if examined.plan is None or examined.problems:
        raise ConfigProblems(list(examined.problems))
    submitted = JobSubmitted(
        config=examined.document,
        resources=await service.resources(examined.plan),
        max_restarts=examined.plan.max_restarts,
        submission_id=job_id,
    )
    await service.log.submit(job_id, submitted, new_event_id(), settings.max_live_jobs)
    _say(f"{job_id} submitted")
    _cancel_on_signals(service, job_id)
    job = await _follow(service, job_id)
    return _report(job)


def _with_files_kept(document: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The request with its relative local files copied to `directory`, which is one of the data roots."""
    kept = dict(document)
    for field in LOCAL_FILES:
        source = document.get(field)
        if not isinstance(source, str) or "://" in source or Path(source).is_absolute() or not Path(source).is_file():
            continue  # what is wrong with it, if anything, is said by the check that every request goes through
        directory.mkdir(parents=True, exist_ok=True)
        kept[field] = shutil.copyfile(source, directory / f"{field}.jsonl").as_posix()
    return kept


def _cancel_on_signals(service: Service, job_id: str) -> None:
    loop = asyncio.get_running_loop()
    pending: set[asyncio.Task[Any]] = set()

    def cancel() -> None:
        _say(f"cancelling {job_id}")
        task = loop.create_task(service.log.append(job_id, [CancelRequested()], [f"{job_id}:cancel"]))
        pending.add(task)  # the loop itself keeps only weak references to tasks

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, cancel)


async def _follow(service: Service, job_id: str) -> FineTuningJob:
    """Print the job's lines until it is over. A job's lines are complete before the event that ends it."""
    offset = 0
    over = False
    while True:
        batch = await service.logs.read(job_id, offset, BATCH_LINES, 0 if over else WAIT_S)
        offset = batch.next
        for line in batch.lines:
            sys.stdout.write(f"{line['message']}\n")
        sys.stdout.flush()
        job = await service.log.job(job_id)
        if over and not batch.lines:
            return job
        over = job.finished_at is not None


def _report(job: FineTuningJob) -> int:
    match job.status:
        case "success":
            _say(f"{job.job_id} succeeded; checkpoints: {' '.join(job.checkpoints)}")
            return SUCCEEDED
        case "cancelled":
            _say(f"{job.job_id} was cancelled")
            return CANCELLED
        case _:
            reason = f"{job.error.code}: {job.error.message}" if job.error else "no reason recorded"
            _say(f"{job.job_id} failed: {reason}")
            if job.error_path:
                _say(f"details: {job.error_path}")
            return FAILED


def _say(text: str) -> None:
    sys.stderr.write(f"tunewright: {text}\n")
    sys.stderr.flush()

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
from events.log import LogUnavailable
from trainers.errors import ConfigProblems, InfrastructureError
from trainers.preflight import examine
from trainers.service import Service, start
from trainers.settings import Settings

SUCCEEDED, FAILED, REFUSED, CANCELLED = 0, 1, 2, 130
BATCH_LINES = 1000
WAIT_S = 5.0
RETRY_S = 1.0
LOCAL_FILES = ("data", "validation_data")


def submit_and_follow(path: Path, settings: Settings) -> int:
    """Print the job's log to stdout and what concerns the job itself to stderr.

    Returns 0 when the job succeeded, 1 when it failed, 2 when it was refused, 130 when it was cancelled.
    """
    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    document = read_config(path)
    if document is None:
        return REFUSED
    try:
        return asyncio.run(_submit_and_follow(document, settings))
    except (ConfigProblems, Refused, InfrastructureError) as refusal:
        _say(f"{path}: {refusal}")
        return REFUSED


def read_config(path: Path) -> dict[str, Any] | None:
    """The request in a file; None, and a word about it on stderr, where there is none."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        _say(f"{path}: {error}")
        return None
    if not isinstance(document, dict):
        _say(f"{path}: must hold one JSON object, the body of POST /fine_tuning/jobs/submit")
        return None
    return document


async def _submit_and_follow(document: dict[str, Any], settings: Settings) -> int:
    service = start(settings)
    job_id = new_job_id()
    await submit(service, job_id, document, settings)
    _say(f"{job_id} submitted")
    _cancel_on_signals(service, job_id)
    return _report(await follow(service, job_id))


async def submit(service: Service, job_id: str, document: dict[str, Any], settings: Settings) -> FineTuningJob:
    """Begin the job. Raises ConfigProblems or Refused, and then keeps no file."""
    files = settings.storage / "data" / job_id
    document = await asyncio.to_thread(_with_files_kept, document, files)
    try:
        submitted = await _examined(service, job_id, document, settings)
        return await service.log.submit(job_id, submitted, new_event_id(), settings.max_live_jobs)
    except (ConfigProblems, Refused):
        shutil.rmtree(files, ignore_errors=True)
        raise


async def _examined(service: Service, job_id: str, document: dict[str, Any], settings: Settings) -> JobSubmitted:
    examined = await asyncio.to_thread(examine, document, settings)
    if examined.plan is None or examined.problems:
        raise ConfigProblems(list(examined.problems))
    return JobSubmitted(
        config=examined.document,
        resources=await service.resources(examined.plan, examined.architecture),
        defaults=examined.plan.defaults,
        max_restarts=examined.plan.max_restarts,
        submission_id=job_id,
    )


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

    def on_signal() -> None:
        _say(f"cancelling {job_id}")
        pending.add(loop.create_task(cancel(service, job_id)))  # the loop itself keeps only weak references to tasks

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)


async def cancel(service: Service, job_id: str) -> None:
    """Ask for the job's end, as often as it takes to reach the log. A job that is over stays as it is."""
    while True:
        try:
            await service.log.append(job_id, [CancelRequested()], [f"{job_id}:cancel"])
        except LogUnavailable:
            await asyncio.sleep(RETRY_S)
        except Refused:
            return
        else:
            return


async def follow(service: Service, job_id: str) -> FineTuningJob:
    """Print the job's lines until it is over, across restarts of the log. A job's lines are complete before the event
    that ends it."""
    offset = 0
    over = False
    while True:
        try:
            batch = await service.logs.read(job_id, offset, BATCH_LINES, 0 if over else WAIT_S)
            offset = batch.next
            for line in batch.lines:
                sys.stdout.write(f"{line['message']}\n")
            sys.stdout.flush()
            job = await service.log.job(job_id)
        except LogUnavailable:
            await asyncio.sleep(RETRY_S)
            continue
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

"""Submits one job from the command line and follows it to its end."""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from events.actors import StorageMismatchError
from events.decide import Refused
from events.facts import CancelRequested, JobSubmitted
from events.ids import new_event_id, new_job_id
from events.job import FineTuningJob
from events.log import LogUnavailable
from trainers.errors import ConfigProblems, InfrastructureError
from trainers.planning.preflight import examine
from trainers.planning.strict_json import parse_object
from trainers.service import Service, start
from trainers.settings import Settings

SUCCEEDED, FAILED, REFUSED, CANCELLED = 0, 1, 2, 130
BATCH_LINES = 1000
WAIT_S = 5.0
RETRY_S = 1.0
TWICE_S = 0.5
"""A second signal within this time is ignored: GNU timeout, for example, sends each signal twice."""
LOCAL_FILES = ("data", "validation_data")


class Unrecorded(Exception):
    """The log couldn't be reached before this process has to end: whether it has the job is unknown."""


def submit_and_follow(path: Path, settings: Settings) -> int:
    """Submit the job in the file `path`. Prints its log to stdout, and messages about the job to stderr. This process
    must have joined the cluster.

    Returns 0 if the job succeeded, 1 if it failed, 2 if there is no job (it was refused, or the service can't be
    reached), 130 if it was cancelled. Also 130 if it was to be cancelled but the log can't be reached: then the job may
    exist and go on. A second signal ends this process at once.
    """
    document = read_config(path)
    if document is None:
        return REFUSED
    job_id = new_job_id()
    try:
        return asyncio.run(_submit_and_follow(path, job_id, document, settings))
    except Unrecorded as error:
        _say(
            f"{job_id} may have been submitted, and may go on: {error}. Once the log can be reached, the API's GET "
            f"/fine_tuning/jobs/status?job_id={job_id} shows it, and POST /fine_tuning/jobs/cancel cancels it"
        )
        return CANCELLED


def read_config(path: Path) -> dict[str, Any] | None:
    """The request in a file, parsed as in the API. If it can't be read, prints why to stderr and returns None."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, ConfigProblems) as error:
        _say(f"{path}: {error}")
        return None


async def _submit_and_follow(path: Path, job_id: str, document: dict[str, Any], settings: Settings) -> int:
    cancelled = _cancelled_by_signals(job_id)
    try:
        service = await asyncio.to_thread(start, settings)
        begun = await submit(service, job_id, document, settings, cancelled)
    except (ConfigProblems, Refused, InfrastructureError, StorageMismatchError, LogUnavailable, OSError) as refusal:
        _say(f"{path}: nothing was submitted: {refusal}")
        return REFUSED
    if not begun:
        _say(f"{path}: cancelled, and nothing was submitted")
        return CANCELLED
    _say(f"{job_id} submitted")
    return _report(await _followed(service, job_id, cancelled))


async def submit(
    service: Service, job_id: str, document: dict[str, Any], settings: Settings, cancelled: asyncio.Event
) -> bool:
    """Record the job's submission; tries again until the log can be reached. Returns False if `cancelled` was set
    before there was anything to cancel.

    Raises ConfigProblems, Refused, InfrastructureError, LogUnavailable or OSError; then, and if it returns False, none
    of the job's files are kept. Raises Unrecorded if the log may have the job.
    """
    files = settings.storage / "data" / job_id
    try:
        document = await asyncio.to_thread(_with_files_kept, document, files)
        submitted = await _examined(service, job_id, document, settings)
        if not cancelled.is_set():
            _say(f"submitting {job_id}")  # from here on the log may have it, even if this process dies
            event_id = new_event_id()
            await _repeated(lambda: service.log.submit(job_id, submitted, event_id, settings.max_live_jobs), cancelled)
            return True
    except Unrecorded:
        raise  # the job may be there, and need its files
    except Exception:
        shutil.rmtree(files, ignore_errors=True)
        raise
    shutil.rmtree(files, ignore_errors=True)
    return False


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
    """The request, with its local files that have relative paths copied to `directory`, which is under a data root."""
    kept = dict(document)
    for field in LOCAL_FILES:
        source = document.get(field)
        if not isinstance(source, str) or "://" in source or Path(source).is_absolute() or not Path(source).is_file():
            continue  # if something is wrong with it, `examine` says so
        directory.mkdir(parents=True, exist_ok=True)
        kept[field] = shutil.copyfile(source, directory / f"{field}.jsonl").as_posix()
    return kept


def _cancelled_by_signals(job_id: str) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets. The next signal ends this process, whatever it is doing."""
    cancelled = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        if not cancelled.is_set():
            _say(f"cancelling {job_id}; a second signal ends this process at once")
            cancelled.set()
            loop.call_later(TWICE_S, let_them_end_it)

    def let_them_end_it() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)  # KeyboardInterrupt would wait for threads

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    return cancelled


async def _followed(service: Service, job_id: str, cancelled: asyncio.Event) -> FineTuningJob:
    """Waits until the job is over and returns it; cancels it once `cancelled` is set. Raises Unrecorded."""
    following = asyncio.create_task(follow(service, job_id))
    cancelling = asyncio.create_task(_cancel_once(service, job_id, cancelled))
    try:
        await asyncio.wait({following, cancelling}, return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            await cancelling
        return await following
    finally:
        following.cancel()
        cancelling.cancel()


async def _cancel_once(service: Service, job_id: str, cancelled: asyncio.Event) -> None:
    await cancelled.wait()
    await cancel(service, job_id, cancelled)


async def cancel(service: Service, job_id: str, cancelled: asyncio.Event) -> None:
    """Request the job's cancellation, if it isn't over. Raises Unrecorded."""
    with suppress(Refused):
        await _repeated(lambda: service.log.append(job_id, [CancelRequested()], [f"{job_id}:cancel"]), cancelled)


async def _repeated(
    append: Callable[[], Coroutine[Any, Any, FineTuningJob]], cancelled: asyncio.Event
) -> FineTuningJob:
    """The job that `append` returns. Repeats the call while the log can't be reached, but only once more after
    `cancelled` is set; repeating is safe, as appends carry event ids. Raises Unrecorded."""
    told = last = False
    while True:
        try:
            return await append()
        except LogUnavailable as error:
            if last:
                raise Unrecorded(str(error)) from error
            last = cancelled.is_set()
            if last or not told:
                _say(f"{error}; trying {'once more' if last else 'again until it does'}")
                told = True
            await asyncio.sleep(RETRY_S)


async def follow(service: Service, job_id: str) -> FineTuningJob:
    """Print the job's lines until it is over, also across restarts of the log. A job's last lines are in the log queue
    before the event that ends the job is in the log."""
    offset = 0
    over = False
    while True:
        try:
            batch = await service.logs.read(job_id, offset, BATCH_LINES, 0 if over else WAIT_S)
            offset = batch.next
            _write(sys.stdout, "".join(f"{line['message']}\n" for line in batch.lines))
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
    _write(sys.stderr, f"tunewright: {text}\n")


def _write(stream: TextIO, text: str) -> None:
    """Writes to stdout or stderr. If whoever read it has gone (`| head`), the rest of the output is dropped: the job
    goes on, and this process waits for its outcome."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""Submit one job from the command line and follow it to its end."""

import asyncio
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

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
"""A signal that comes again within this is the same one: GNU timeout, for one, sends its own twice."""
LOCAL_FILES = ("data", "validation_data")


class Unrecorded(Exception):
    """The log couldn't be reached, and this process is to end: what it has of the job is not known."""


def submit_and_follow(path: Path, settings: Settings) -> int:
    """Print the job's log to stdout and what concerns the job itself to stderr. This process has joined the cluster.

    Returns 0 when the job succeeded, 1 when it failed, 2 when there is no job (it was refused, or the service can't be
    reached), 130 when it was cancelled, or was to be and the log can't be reached: then it may be there and go on. A
    second signal ends this process at once.
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
    """The request in a file, read as the API reads one; None, and a word about it on stderr, where there is none."""
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
    """Begin the job, as often as it takes to reach the log. False: `cancelled` was set before there was anything to
    cancel.

    Raises ConfigProblems, Refused, InfrastructureError, LogUnavailable or OSError: then, as after False, none of its
    files is kept. Raises Unrecorded when it may have begun.
    """
    files = settings.storage / "data" / job_id
    try:
        document = await asyncio.to_thread(_with_files_kept, document, files)
        submitted = await _examined(service, job_id, document, settings)
        if not cancelled.is_set():
            _say(f"submitting {job_id}")  # from here on it may be in the log, whatever becomes of this process
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
    """The request with its relative local files copied to `directory`, which is one of the data roots."""
    kept = dict(document)
    for field in LOCAL_FILES:
        source = document.get(field)
        if not isinstance(source, str) or "://" in source or Path(source).is_absolute() or not Path(source).is_file():
            continue  # what is wrong with it, if anything, is said by the check that every request goes through
        directory.mkdir(parents=True, exist_ok=True)
        kept[field] = shutil.copyfile(source, directory / f"{field}.jsonl").as_posix()
    return kept


def _cancelled_by_signals(job_id: str) -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM. The next one ends this process, whatever it does then."""
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
            signal.signal(number, signal.SIG_DFL)  # not the loop's own way, which would wait for threads

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    return cancelled


async def _followed(service: Service, job_id: str, cancelled: asyncio.Event) -> FineTuningJob:
    """The job once it is over; it is cancelled when `cancelled` is set. Raises Unrecorded."""
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
    """Ask for the job's end. A job that is over stays as it is. Raises Unrecorded."""
    with suppress(Refused):
        await _repeated(lambda: service.log.append(job_id, [CancelRequested()], [f"{job_id}:cancel"]), cancelled)


async def _repeated(
    append: Callable[[], Coroutine[Any, Any, FineTuningJob]], cancelled: asyncio.Event
) -> FineTuningJob:
    """The job that `append` returns, asked again for as long as the log can't be reached; but only once more when
    `cancelled` is set by then. It carries its event ids. Raises Unrecorded."""
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

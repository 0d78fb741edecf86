"""The log and the log queue as Ray actors, one each per cluster, and the handles to call them by.

Both are detached, live on the head node, and start again whenever their process dies (`max_restarts=-1`). Calls that
were under way are made again (`max_task_retries=-1`); event ids and line numbers make that harmless.

    handles = connect(settings.storage)
    job = await handles.log.job(job_id)              # in asyncio code: Serve replicas, asyncio actors
    job = blocking(handles.log.job(job_id))          # in a thread without an event loop
"""

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from events.facts import Event, JobSubmitted
from events.job import FineTuningJob
from events.log import EventLog, LiveJobs, LogUnavailable
from events.log_queue import LogBatch, LogQueue
from events.sqlite import LOG_FILE, SqliteStore, lock
from events.store import Recorded, StoreLockedError

NAMESPACE = "tunewright"
EVENT_LOG = "tunewright-event-log"
LOG_QUEUE = "tunewright-log-queue"

CALL_TIMEOUT_S = 30.0
"""How long a call waits for an answer (beyond its own `wait_s`): longer than an actor takes to start again."""
_LOCK_WAIT_S = 20.0
_BACKUP_S = 3600.0  # a copy of a large log onto a slow disk

T = TypeVar("T")


class About(NamedTuple):
    """An actor's storage directory and process id."""

    storage: str
    pid: int


class StorageMismatchError(Exception):
    """The cluster's actors use another storage directory than the one asked for."""


class _EventLogActor(EventLog):
    def __init__(self, storage: str) -> None:
        log_with_times()
        self._storage = storage
        super().__init__(_patiently(lambda: SqliteStore(Path(storage) / LOG_FILE)))
        collect_rarely()

    async def about(self) -> About:
        return _about(self._storage)


class _LogQueueActor(LogQueue):
    def __init__(self, storage: str) -> None:
        """Takes a lock: two processes that append to the same log file would both count its lines, wrongly."""
        log_with_times()
        self._storage = storage
        self._lock = _patiently(lambda: lock(Path(storage) / "log-queue.lock"))
        super().__init__(Path(storage))
        collect_rarely()

    async def about(self) -> About:
        return _about(self._storage)


def log_with_times() -> None:
    """Sets up logging in a process of the service, with times, which Ray's files of its output lack. From libraries,
    only warnings and errors are logged."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s -- %(message)s")
    logging.getLogger("tunewright").setLevel(logging.INFO)


def collect_rarely() -> None:
    """Makes garbage collection rare, for a process that serves many requests. The objects of a commit or a request are
    freed by their reference counts and all others stay, so collecting at the usual pace finds nothing. It took up to a
    fifth of the time of an append, and stopped a thousand tails for 0.2 s."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def _patiently(open_: Callable[[], T]) -> T:
    """Waits up to _LOCK_WAIT_S while another process holds the lock: this process's predecessor may need a moment to
    die, and Ray would not retry a failed start."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return open_()
        except StoreLockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _about(storage: str) -> About:
    return About(storage, os.getpid())


def _actor(cls: type, name: str, storage: Path) -> ActorHandle[Any]:
    """The actor of that name, started if there is none. Raises LogUnavailable if it ends while Ray looks it up."""
    options = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 10_000,  # a long poll holds a slot while it waits
        "num_cpus": 0,
        "resources": {"node:__internal_head__": 0.001},
    }
    make: Any = ray.remote(cls)  # Ray's type hints don't know that it is a class
    try:
        handle: ActorHandle[Any] = make.options(**options).remote(str(storage))
    except ValueError as error:  # from Ray's second look-up of the name, which the actor has not survived
        raise LogUnavailable(f"{name} has died: {error}") from error
    return handle


class _Client:
    """Calls methods of one of the actors. Picklable."""

    def __init__(self, cls: type, name: str, storage: Path) -> None:
        self._cls, self._name, self._storage = cls, name, storage
        self._handle = _actor(cls, name, storage)

    async def about(self) -> About:
        """Raises LogUnavailable."""
        about: About = await self._call("about")
        return about

    async def _call(self, method: str, *arguments: object, wait_s: float = 0, **options: object) -> Any:  # noqa: ANN401  -- as the method
        """The method's result or its own exception. LogUnavailable: no answer, or the actor is gone for good."""
        try:
            async with asyncio.timeout(wait_s + CALL_TIMEOUT_S):
                return await getattr(self._handle, method).remote(*arguments, **options)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            self._handle = _actor(self._cls, self._name, self._storage)  # if it was killed for good: a new one
            raise LogUnavailable(f"{self._name} has died: {error}") from error
        except (RayError, TimeoutError) as error:
            raise LogUnavailable(f"{self._name} does not answer: {str(error) or 'no answer in time'}") from error


class EventLogClient(_Client):
    """`EventLog`'s methods, in the actor. They raise what it raises, and LogUnavailable."""

    def __init__(self, storage: Path) -> None:
        super().__init__(_EventLogActor, EVENT_LOG, storage)
        self._wanted: dict[str, asyncio.Future[bytes | Exception]] = {}  # by the next call; see job_json
        self._fetching: asyncio.Task[None] | None = None

    async def submit(
        self, job_id: str, event: JobSubmitted, event_id: str, max_live_jobs: int, *, retried: bool = False
    ) -> FineTuningJob:
        job: FineTuningJob = await self._call("submit", job_id, event, event_id, max_live_jobs, retried=retried)
        return job

    async def answered(self, job_id: str) -> None:
        await self._call("answered", job_id)

    async def append(
        self, job_id: str, events: list[Event], event_ids: list[str], expected_version: int | None = None
    ) -> FineTuningJob:
        job: FineTuningJob = await self._call("append", job_id, events, event_ids, expected_version)
        return job

    async def job(self, job_id: str) -> FineTuningJob:
        job: FineTuningJob = await self._call("job", job_id)
        return job

    async def job_with_key(self, idempotency_key: str) -> FineTuningJob | None:
        """None also if the actor is of a version without this method; a submit with a known key still finds its job."""
        if not hasattr(self._handle, "job_with_key"):
            return None
        job: FineTuningJob | None = await self._call("job_with_key", idempotency_key)
        return job

    async def job_json(self, job_id: str) -> bytes:
        """The job's JSON as of some moment after this was called. For use from one event loop.

        Requests that arrive while a call is in flight share the next call: with many clients that poll, calls of the
        actor would otherwise cost more than the rest of the answers.
        """
        if (answer := self._wanted.get(job_id)) is None:
            answer = self._wanted[job_id] = asyncio.get_running_loop().create_future()
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
        encoded = await asyncio.shield(answer)  # others may wait for it too
        if isinstance(encoded, Exception):
            raise encoded
        return encoded

    async def _fetch(self) -> None:
        """Calls the actor until no request waits."""
        while self._wanted:
            wanted, self._wanted = self._wanted, {}
            found: Sequence[bytes | Exception]
            try:
                found = await self._call("jobs_json", list(wanted))
            except Exception as error:  # noqa: BLE001  -- raised where the answer is waited for
                found = [error] * len(wanted)
            for future, answer in zip(wanted.values(), found, strict=True):
                future.set_result(answer)
        self._fetching = None

    async def jobs(self, limit: int, after: str | None = None) -> tuple[list[FineTuningJob], bool]:
        page: tuple[list[FineTuningJob], bool] = await self._call("jobs", limit, after)
        return page

    async def live_jobs(self) -> LiveJobs:
        live: LiveJobs = await self._call("live_jobs")
        return live

    async def read(self, job_id: str, after_version: int = -1, limit: int = 1000) -> list[Recorded]:
        history: list[Recorded] = await self._call("read", job_id, after_version, limit)
        return history

    async def subscribe(self, after_position: int, limit: int = 1000, wait_s: float = 0) -> list[Recorded]:
        history: list[Recorded] = await self._call("subscribe", after_position, limit, wait_s, wait_s=wait_s)
        return history

    async def wait(self, job_id: str, after_version: int, wait_s: float) -> FineTuningJob:
        job: FineTuningJob = await self._call("wait", job_id, after_version, wait_s, wait_s=wait_s)
        return job

    async def backup(self, file: str) -> None:
        """`file` is a path on the head node."""
        await self._call("backup", file, wait_s=_BACKUP_S)


AnyLog = EventLog | EventLogClient
"""The log itself or its client: code that takes either can be tested without Ray."""


class LogQueueClient(_Client):
    """`LogQueue`'s methods, in the actor. They raise what it raises, and LogUnavailable."""

    def __init__(self, storage: Path) -> None:
        super().__init__(_LogQueueActor, LOG_QUEUE, storage)

    async def append(self, job_id: str, source: str, seq: int, lines: Sequence[tuple[str, str]]) -> int:
        written: int = await self._call("append", job_id, source, seq, lines)
        return written

    async def read(self, job_id: str, after: int = 0, limit: int = 1000, wait_s: float = 0) -> LogBatch:
        batch: LogBatch = await self._call("read", job_id, after, limit, wait_s, wait_s=wait_s)
        return batch

    async def wake(self, job_id: str) -> None:
        await self._call("wake", job_id)


@dataclass(frozen=True)
class Handles:
    log: EventLogClient
    lines: LogQueueClient


def connect(storage: Path) -> Handles:
    """Handles to this cluster's actors, which are started if there are none. Ray must be initialised.

    Blocks until both answer. Raises StorageMismatchError, or LogUnavailable.
    """
    storage = storage.resolve()
    handles = Handles(EventLogClient(storage), LogQueueClient(storage))
    for client in (handles.log, handles.lines):
        kept = blocking(client.about()).storage
        if kept != str(storage):
            raise StorageMismatchError(
                f"this Ray cluster keeps its jobs in {kept}, not in {storage}: set TUNEWRIGHT_STORAGE to the former, "
                "or RAY_ADDRESS to the cluster of the latter"
            )
    return handles


def blocking(call: Coroutine[Any, Any, T]) -> T:
    """The result of an async call, for threads that have no event loop of their own running."""
    return asyncio.run_coroutine_threadsafe(call, _background_loop()).result()


@cache
def _background_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="tunewright-calls", daemon=True).start()
    return loop

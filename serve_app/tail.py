"""GET /fine_tuning/jobs/tail: a job's log lines as NDJSON, replayed and then followed.

Each line is a `TailLine`: `{"logs": [{"message", "timestamp"}, ...], "next": offset}`. `next` is where the line ends,
so a reader that reconnects with the last `next` it saw loses and repeats nothing. Nothing is kept for a reader between
two lines, and the next batch is read only when the last one has been sent: a slow reader delays nobody. Readers at the
same place share one question to the log (`Together`).

The end: a job's lines are all in the queue before its terminal event is in the log. So once the job is known to be
over, whatever a read finds is the rest, and an empty read means that everything was sent.

A replica that is about to end closes the streams that follow a job: a last line with their offset, and no `status`.
"""

import asyncio
import json
from asyncio import FIRST_COMPLETED, Task
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from events.job import FineTuningJob
from events.log import LogUnavailable
from events.log_queue import LogBatch
from serve_app.backend import Backend

BATCH_LINES = 500  # At most this many log lines in one line of the stream.
WATCH_S = 30.0  # How long one question for news about the job may wait.
RETRY_S = 1.0  # Pause before the log is asked again after it could not be reached.

T = TypeVar("T")


class Together:
    """Questions that several readers ask at the same time are asked once, for all of them. For one event loop."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, Task[Any]] = {}
        self._asking: dict[Task[Any], int] = {}

    async def ask(self, question: Hashable, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` returns or raises."""
        with self.asking(question, ask) as task:
            return await asyncio.shield(task)

    @contextmanager
    def asking(self, question: Hashable, ask: Callable[[], Awaitable[T]]) -> Iterator[Task[T]]:
        """The question under way, to be waited for and not cancelled: it is when nobody wants the answer any more."""
        task = self._under_way.get(question)
        if task is None or task.done():
            task = self._under_way[question] = asyncio.create_task(_awaited(ask))
            self._asking[task] = 0
        self._asking[task] += 1
        try:
            yield task
        finally:
            self._asking[task] -= 1
            if not self._asking[task]:
                del self._asking[task]
                task.cancel()
                if self._under_way.get(question) is task:
                    del self._under_way[question]


async def _awaited(ask: Callable[[], Awaitable[T]]) -> T:
    return await ask()


class _Read(NamedTuple):
    next: int
    line: bytes | None
    """None: there was none."""


async def tail(
    backend: Backend,
    job: FineTuningJob,
    together: Together,
    *,
    after: int,
    follow: bool,
    heartbeat_s: float,
    closing: asyncio.Event,
) -> AsyncGenerator[bytes, None]:
    """The lines of the stream, from offset `after`. `job` is as it was read just now.

    Ends after the job's last line, or without `follow` when what is there now has been sent; and once `closing` is set,
    if more might come.
    """
    watch = asyncio.create_task(_until_over(backend, job, together)) if follow and not job.over else None
    closed = asyncio.create_task(closing.wait())
    try:
        while True:
            if watch is not None and watch.done():
                job, watch = watch.result(), None
            if watch is not None and closed.done():
                yield _line(after)
                return
            # From here on, no watch means that nothing more is worth waiting for.
            try:
                news = {watch, closed} if watch else set()
                read = await _read(backend, job.job_id, after, heartbeat_s, news, together)
            except LogUnavailable:
                yield _line(after)
                await asyncio.sleep(RETRY_S)
                continue
            if read is None:
                continue
            after = read.next
            if read.line is None and watch is None:
                yield _line(after, status=job.status if job.over else None)
                return
            yield read.line or _line(after)
    finally:
        closed.cancel()
        if watch is not None:
            watch.cancel()


async def _read(
    backend: Backend, job_id: str, after: int, heartbeat_s: float, news: set[Task[Any]], together: Together
) -> _Read | None:
    """The lines after `after`; none when it is time for a heartbeat. Where there may be other `news`, waits for some
    lines: None once there is such news. Raises LogUnavailable."""
    wait_s = heartbeat_s if news else 0.0

    async def read() -> _Read:
        batch = await backend.logs.read(job_id, after, BATCH_LINES, wait_s)
        return _Read(batch.next, _line(batch.next, batch) if batch.lines else None)

    # One that was under way before the job was over may have missed its last lines.
    question = (job_id, after) if news else object()
    with together.asking(question, read) as reading:
        await asyncio.wait({reading, *news}, timeout=0.9 * heartbeat_s, return_when=FIRST_COMPLETED)
        if reading.done():
            return reading.result()
        if not news:
            raise LogUnavailable("the log lines don't come")
        return None if any(task.done() for task in news) else _Read(after, None)


async def _until_over(backend: Backend, job: FineTuningJob, together: Together) -> FineTuningJob:
    """The job as it is once it has ended."""
    while not job.over:
        news = partial(backend.log.wait, job.job_id, job.version, WATCH_S)
        try:
            job = await together.ask((job.job_id, "news", job.version), news)
        except LogUnavailable:
            await asyncio.sleep(RETRY_S)
    return job


def _line(after: int, batch: LogBatch | None = None, status: str | None = None) -> bytes:
    line: dict[str, Any] = {"logs": batch.lines if batch else [], "next": after}
    if status is not None:
        line["status"] = status
    return json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n"

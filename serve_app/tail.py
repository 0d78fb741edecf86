"""GET /fine_tuning/jobs/tail: a job's log lines as NDJSON, replayed and then followed.

Each line is a `TailLine`: `{"logs": [{"message", "timestamp"}, ...], "next": offset}`. `next` is where the line ends,
so a reader that reconnects with the last `next` it saw loses and repeats nothing. Nothing is kept for a reader between
two lines, and the next batch is read only when the last one has been sent: a slow reader delays nobody. Readers at the
same place wait together (`Together`): of what a line costs, only the sending is done for each of them.

The end: a job's lines are all in the queue before its terminal event is in the log. So once the job is known to be
over, whatever a read finds is the rest, and an empty read means that everything was sent.

A replica that is about to end closes the streams that follow a job, with a last line that has their offset and no
`status`.
"""

import asyncio
import json
from asyncio import FIRST_COMPLETED, Task
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

from events.job import FineTuningJob
from events.log import LogUnavailable
from events.log_queue import LogBatch
from serve_app.backend import Backend

BATCH_LINES = 500  # At most this many log lines in one line of the stream.
WATCH_S = 30.0  # How long one question for news about the job may wait.
RETRY_S = 1.0  # Pause before the log is asked again after it could not be reached.

_LINE_ENDS = {char: f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""Characters that JSON needn't escape, but that end a line for readers which go by Unicode (httpx, Python's
splitlines)."""

T = TypeVar("T")


class Together:
    """Calls that several readers make at the same time are made once, for all of them. For one event loop."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, Task[Any]] = {}
        self._asking: dict[Task[Any], int] = {}

    async def ask(self, question: Hashable, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` returns or raises."""
        with self.asking(question, ask) as task:
            return await asyncio.shield(task)

    @contextmanager
    def asking(self, question: Hashable, ask: Callable[[], Awaitable[T]]) -> Iterator[Task[T]]:
        """The task of the shared call. Wait for it, but don't cancel it: it is cancelled once no reader waits for
        it."""
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
    """None: there were no lines."""


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
    end = partial(_until_over, backend, job)
    with together.asking((job.job_id, "over"), end) if follow and not job.over else nullcontext() as over:
        while True:
            if over is not None and over.done():
                job, over = over.result(), None
            # From here on, `over is None` means that there is nothing to wait for.
            if over is not None and closing.is_set():
                yield _line(after)
                return
            try:
                if over is not None:
                    waiting = partial(_wait, backend, job.job_id, after, heartbeat_s, over, closing)
                    read = await together.ask((job.job_id, after), waiting)
                else:
                    # Not shared: a read that began before the job was over may have missed its last lines.
                    read = await _read(backend, job.job_id, after, heartbeat_s)
            except LogUnavailable:
                yield _line(after)
                await asyncio.sleep(RETRY_S)
                continue
            if read is None:
                continue
            after = read.next
            if read.line is None and over is None:
                yield _line(after, status=job.status if job.over else None)
                return
            yield read.line or _line(after)


async def _wait(
    backend: Backend,
    job_id: str,
    after: int,
    heartbeat_s: float,
    over: Task[FineTuningJob],
    closing: asyncio.Event,
) -> _Read | None:
    """The lines from offset `after` on as soon as there are some, or none when it is time for a heartbeat. Returns None
    once the job is `over`, or the streams are closing."""
    reading = asyncio.create_task(backend.logs.read(job_id, after, BATCH_LINES, heartbeat_s))
    closed = asyncio.create_task(closing.wait())
    try:
        await asyncio.wait({reading, over, closed}, timeout=0.9 * heartbeat_s, return_when=FIRST_COMPLETED)
        if reading.done():
            return _as_read(reading.result())
        return None if over.done() or closed.done() else _Read(after, None)
    finally:
        reading.cancel()
        closed.cancel()


async def _read(backend: Backend, job_id: str, after: int, patience_s: float) -> _Read:
    """The lines from offset `after` on that are there now. Raises LogUnavailable."""
    try:
        async with asyncio.timeout(patience_s):
            return _as_read(await backend.logs.read(job_id, after, BATCH_LINES, 0.0))
    except TimeoutError:
        raise LogUnavailable("the log queue doesn't answer") from None


def _as_read(batch: LogBatch) -> _Read:
    return _Read(batch.next, _line(batch.next, batch) if batch.lines else None)


async def _until_over(backend: Backend, job: FineTuningJob) -> FineTuningJob:
    """The job as it is once it has ended."""
    while not job.over:
        try:
            job = await backend.log.wait(job.job_id, job.version, WATCH_S)
        except LogUnavailable:
            await asyncio.sleep(RETRY_S)
    return job


def _line(after: int, batch: LogBatch | None = None, status: str | None = None) -> bytes:
    line: dict[str, Any] = {"logs": batch.lines if batch else [], "next": after}
    if status is not None:
        line["status"] = status
    text = json.dumps(line, ensure_ascii=False)
    for end, escaped in _LINE_ENDS.items():
        text = text.replace(end, escaped)
    return text.encode(errors="replace") + b"\n"

"""`LogQueue`: the log lines of every job, addressed by offset. Plain asyncio, without Ray.

Reading consumes nothing: any number of readers each ask for the lines from an offset on. The newest lines of each busy
job are in memory; all lines are on disk, in the job's directory (`events.spool`).
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from events.bell import Bell
from events.ids import is_job_id
from events.spool import Line, Spool

WINDOW_LINES = 1000
WINDOW_BYTES = 256 * 1024
READ_BYTES = 1024 * 1024
"""Maximum size of one read from disk."""
IDLE_S = 300.0
"""A job whose lines nobody has written or read for this long is dropped from memory."""

T = TypeVar("T")


class LogBatch(NamedTuple):
    """Lines in order, and the offset of the one after them: the next `after`."""

    lines: list[Line]
    next: int


class LogQueue:
    """Every method is a coroutine for one event loop; arguments and results pickle. A job without lines reads as empty.
    Raises ValueError for a job id that is no plain name."""

    def __init__(self, storage: Path, *, idle_s: float = IDLE_S) -> None:
        self._directory = storage / "jobs"
        self._idle_s = idle_s
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="log-queue")
        self._bell = Bell()
        self._open: dict[str, _OpenJob] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._swept = time.monotonic()

    async def append(self, job_id: str, source: str, seq: int, lines: Sequence[tuple[str, str]]) -> int:
        """Adds (timestamp, message) pairs; returns the number of lines that `source` has written so far.

        `seq` counts the source's lines from 0 and is that of the first one here. Lines that are there already are
        skipped, so a batch may be sent again, or overlap the one before. A writer that starts counting anew must use
        a new source name. Messages are cut at `spool.MAX_MESSAGE` characters. When this returns, the operating system
        has the lines. Raises OSError if they can't be written (try again).
        """
        directory = self._job_dir(job_id)
        async with self._locks.setdefault(job_id, asyncio.Lock()):
            job = await self._opened(job_id, directory, create=True)
            assert job is not None  # noqa: S101  -- it was created
            try:
                added = await self._in_thread(lambda: job.spool.append(source, seq, lines))
            except OSError:
                self._open.pop(job_id, None)  # when it is opened again, a half-written line is cut off
                raise
            job.keep(added)
        if added:
            self._bell.ring(job_id)
        self._forget_idle_jobs()
        return job.spool.next_seq(source)

    async def read(self, job_id: str, after: int = 0, limit: int = 1000, wait_s: float = 0) -> LogBatch:
        """The lines from offset `after` on: at most `limit`, and about a megabyte. `after` is the `next` of the batch
        before, or 0 for the start; an offset beyond the end counts as the end. Waits up to `wait_s` for the first line,
        and returns empty if none comes or `wake` is called."""
        directory = self._job_dir(job_id)
        job = await self._known(job_id, directory)
        if wait_s > 0 and (job is None or after >= job.spool.lines):
            await self._bell.heard(job_id, wait_s)
            job = await self._known(job_id, directory)
        self._forget_idle_jobs()
        if job is None:
            return LogBatch([], 0)
        job.touch()
        after = min(max(after, 0), job.spool.lines)
        if after == job.spool.lines:
            return LogBatch([], after)
        recent = job.recent(after, limit)
        if recent is not None:
            return LogBatch(recent, after + len(recent))
        return LogBatch(*await self._in_thread(lambda: job.spool.read(after, limit, READ_BYTES)))

    async def wake(self, job_id: str) -> None:
        """Makes readers that wait for this job return at once, for news other than lines, such as its end."""
        self._bell.ring(job_id)

    async def close(self) -> None:
        self._threads.shutdown()

    def _job_dir(self, job_id: str) -> Path:
        if not is_job_id(job_id):
            raise ValueError(f"{job_id!r} is not a job id")
        return self._directory / job_id

    async def _known(self, job_id: str, directory: Path) -> "_OpenJob | None":
        if job_id in self._open:
            return self._open[job_id]
        if not await self._in_thread(lambda: Spool.exists(directory)):
            return self._open.get(job_id)  # it may have begun meanwhile
        async with self._locks.setdefault(job_id, asyncio.Lock()):
            return await self._opened(job_id, directory, create=False)

    async def _opened(self, job_id: str, directory: Path, *, create: bool) -> "_OpenJob | None":
        """Call it with the job's lock held."""
        if job_id not in self._open:
            spool = await self._in_thread(lambda: _open_spool(directory, create=create))
            self._open[job_id] = _OpenJob(spool)
        return self._open[job_id]

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _forget_idle_jobs(self) -> None:
        now = time.monotonic()
        if now - self._swept < self._idle_s / 4:
            return
        self._swept = now
        for job_id, job in list(self._open.items()):
            if now - job.used > self._idle_s and not self._locks[job_id].locked():
                del self._open[job_id], self._locks[job_id]


class _OpenJob:
    """A job in memory: its spool and its newest lines (the window)."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.used = time.monotonic()
        self._window: deque[Line] = deque()
        self._start = spool.lines
        self._bytes = 0

    def touch(self) -> None:
        self.used = time.monotonic()

    def keep(self, added: Sequence[Line]) -> None:
        """Adds written lines to the window, and drops the oldest ones beyond its size."""
        self.touch()
        self._window.extend(added)
        self._bytes += sum(map(_size, added))
        while len(self._window) > WINDOW_LINES or self._bytes > WINDOW_BYTES:
            self._bytes -= _size(self._window.popleft())
            self._start += 1

    def recent(self, first: int, limit: int) -> list[Line] | None:
        """Lines from offset `first` on; None if that one is not in the window."""
        skip = first - self._start
        if not 0 <= skip < len(self._window):
            return None
        return list(islice(self._window, skip, skip + limit))


def _size(line: Line) -> int:
    return len(line["message"]) + len(line["timestamp"])


def _open_spool(directory: Path, *, create: bool) -> Spool:
    if create:
        directory.mkdir(parents=True, exist_ok=True)
    return Spool(directory)

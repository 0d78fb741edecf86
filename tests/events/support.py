"""What the tests of the log share: logs that are opened, written to, damaged, and disks that are full."""

import resource
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import datetime
from pathlib import Path

from events.codec import AnyEvent, encode
from events.facts import Event, JobSubmitted
from events.log import EventLog
from events.sqlite import SqliteStore
from events.store import NO_STREAM, EventStore, Recorded
from tests.events.facts_of_a_job import ADMITTED, START, SUBMITTED, VALIDATED, measured, started, step

TIME = "2026-11-22T12:00:00Z"


@asynccontextmanager
async def opened(store: EventStore | Path) -> AsyncIterator[EventLog]:
    log = EventLog(SqliteStore(store) if isinstance(store, Path) else store)
    try:
        yield log
    finally:
        await log.close()


async def submit(log: EventLog, job_id: str, event: JobSubmitted = SUBMITTED, limit: int = 100) -> None:
    await log.submit(job_id, event, f"{job_id}-submitted", limit)


async def append(log: EventLog, job_id: str, *events: Event, expected: int | None = None) -> None:
    ids = [f"{job_id}-{event.type}-{number}" for number, event in enumerate(events)]
    await log.append(job_id, list(events), ids, expected)


def add(store: EventStore, new: Iterable[tuple[str, str, AnyEvent]], time: datetime = START) -> list[Recorded]:
    """Appends each (job, event id, event), all in one batch."""
    ends: dict[str, int] = {}
    history: list[Recorded] = []
    for position, (job_id, event_id, event) in enumerate(new, store.last_position() + 1):
        if job_id not in ends:
            ends[job_id] = len(store.read_stream(job_id)) + NO_STREAM
        ends[job_id] += 1
        history.append(Recorded(position, job_id, ends[job_id], event_id, time, event))
    store.append([(recorded, encode(recorded.event)) for recorded in history])
    return history


def write(file: Path, jobs: Iterable[str] = "abc") -> None:
    """Five events of each job, in turns: those of `b` are at positions 2, 5, 8, ..."""
    facts: list[Event] = [SUBMITTED, VALIDATED, ADMITTED, started(1), measured(1, step(1))]
    with closing(SqliteStore(file)) as store:
        for number, fact in enumerate(facts):
            add(store, [(job, f"{job}{number}", fact) for job in jobs])


def change(file: Path, sql: str) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        db.execute(sql)


@contextmanager
def full_disk(file: Path) -> Iterator[None]:
    """No file of this process may grow beyond that one's size: its next write fails in the kernel."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def numbered(first: int, count: int) -> list[tuple[str, str]]:
    return [(TIME, f"line {number}") for number in range(first, first + count)]


def check_all(store: SqliteStore) -> int:
    """Checks the whole store, and returns the position reached."""
    position = 0
    while (reached := store.check(position)) > position:
        position = reached
    return position


def history_of(directory: Path) -> list[Recorded]:
    """All events of a log. Checks that positions and versions have no gaps, event ids are all different, every checksum
    is right, and the indexes lead to the events of each job."""
    with closing(SqliteStore(directory / "events.db")) as store:
        assert store.integrity() == []
        position, history = 0, []
        while page := store.read_all(position, 10_000):
            history += page
            position = page[-1].position
        check_all(store)
        assert not store.damage, store.damage
        streams: defaultdict[str, list[Recorded]] = defaultdict(list)
        for one in history:
            streams[one.job_id].append(one)
        assert all(store.read_stream(job_id, limit=len(history)) == stream for job_id, stream in streams.items())
    assert [one.position for one in history] == list(range(1, len(history) + 1))
    assert len({one.event_id for one in history}) == len(history)
    assert all([one.version for one in stream] == list(range(len(stream))) for stream in streams.values())
    return history

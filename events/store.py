"""The event store: streams of events, one a job, in one global order. `events.memory` and `events.sqlite` keep it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from events.codec import AnyEvent, encode

NO_STREAM = -1
"""Expected version of a stream that has no event yet."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event with its place in history."""

    position: int
    """Place among all events of the store, from 1, without gaps."""
    job_id: str
    version: int
    """Place in the job's stream, from 0."""
    event_id: str
    time: datetime
    """When it was appended, UTC."""
    event: AnyEvent


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to be written, already encoded: one that can't be is refused before it reaches a batch."""

    event_id: str
    event: AnyEvent
    body: str

    @classmethod
    def of(cls, event_id: str, event: AnyEvent) -> "NewEvent":
        return cls(event_id, event, encode(event))


@dataclass(frozen=True, slots=True)
class StreamAppend:
    """Events for one stream. `expected_version`: of its last event, -1 when there is no stream yet, None for any."""

    job_id: str
    events: Sequence[NewEvent]
    expected_version: int | None = None


class ExpectedVersionError(Exception):
    """A stale writer: the stream moved on since it was read. Nothing was written."""

    def __init__(self, job_id: str, expected: int, actual: int) -> None:
        super().__init__(f"job {job_id}: expected version {expected}, is {actual}")
        self.job_id = job_id
        self.expected = expected
        self.actual = actual

    def __reduce__(self) -> tuple[type["ExpectedVersionError"], tuple[str, int, int]]:
        return type(self), (self.job_id, self.expected, self.actual)


class StoreLockedError(Exception):
    """Another process has the store open for writing."""


class StoreFailedError(Exception):
    """A write failed and nobody knows yet whether it reached the disk. The store has stopped: `reopen`, read what is
    there after the last position that was acknowledged, and only then go on."""


@dataclass(frozen=True, slots=True)
class Damage:
    """An event that can't be read as it was written: a flipped bit, a lost page, a row that is gone."""

    position: int
    """0: no event, but the store's own record of how many there are."""
    job_ids: tuple[str, ...]
    """Whose event it is. Empty: nothing tells any more."""
    why: str


class JobDamagedError(Exception):
    """Events of the job can't be read as they were written."""


class EventStore(Protocol):
    """Synchronous; calls must not overlap (`EventLog` makes them from one thread), but `backup`, `snapshot` and
    `keep_snapshot` may run beside the others. Any may raise StoreFailedError."""

    damage: dict[int, Damage]
    """By position: what reading has come across since the store was opened."""

    def last_position(self) -> int:
        """Of the last event; 0 when there is none."""
        ...

    def append(self, batch: Sequence[StreamAppend], time: datetime) -> list[list[Recorded]]:
        """Writes all of the batch or nothing, durably, and returns where each event stands.

        An event id that was written before (or earlier in the batch) is not written again: the first one's
        coordinates are returned. Expected versions are checked against the batch so far; a stream append that
        brings nothing new is not checked.

        Raises ExpectedVersionError (nothing was written) or StoreFailedError.
        """
        ...

    def find(self, event_ids: Collection[str]) -> dict[str, Recorded]:
        """Those of the events that were written. Leaves out what is damaged, and notes it in `damage`."""
        ...

    def read_stream(self, job_id: str, after_version: int = -1, limit: int = 1000) -> list[Recorded]:
        """Events of one job in order, those after `after_version`. Empty for an unknown job.

        Raises JobDamagedError.
        """
        ...

    def read_all(self, after_position: int = 0, limit: int = 1000) -> list[Recorded]:
        """Events of all jobs in order, those after `after_position`. Leaves out what is damaged, and notes it in
        `damage`; empty at the end of the log only."""
        ...

    def check(self, after_position: int, limit: int = 500) -> int:
        """Reads the next `limit` events and all that leads to them, notes in `damage` what is wrong, and returns the
        position it has come to: the last one when that was all."""
        ...

    def snapshot(self) -> bytes | None:
        """What `keep_snapshot` was given last, if it is still there. Nobody has checked it."""
        ...

    def keep_snapshot(self, snapshot: bytes) -> None:
        """Keeps it in place of the one before. Raises OSError; then that one is still there."""
        ...

    def backup(self, file: Path) -> None:
        """Writes a copy of the store, as of one moment before it returns, without holding up the other calls.

        Raises FileExistsError, OSError or StoreFailedError; then there is no `file`.
        """
        ...

    def reopen(self) -> None:
        """After StoreFailedError: makes sure that what can be read from now on is on disk. Raises StoreFailedError."""
        ...

    def close(self) -> None: ...


def place(batch: Sequence[StreamAppend], known: dict[str, Recorded], versions: dict[str, int], position: int,
          time: datetime) -> tuple[list[list[Recorded]], list[tuple[Recorded, str]]]:  # fmt: skip
    """The rules of `append`, for every store: where each event of the batch goes, and which are new (with their body).

    `known` holds the batch's events that were written before, `versions` the last version of each of its streams,
    `position` the store's last position. The first two are updated.
    """
    placed: list[list[Recorded]] = []
    new: list[tuple[Recorded, str]] = []
    for stream in batch:
        actual = versions.get(stream.job_id, NO_STREAM)
        brings_news = any(event.event_id not in known for event in stream.events)
        if brings_news and stream.expected_version not in (None, actual):
            raise ExpectedVersionError(stream.job_id, stream.expected_version, actual)
        for event in stream.events:
            if event.event_id not in known:
                actual += 1
                position += 1
                recorded = Recorded(position, stream.job_id, actual, event.event_id, time, event.event)
                known[event.event_id] = recorded
                new.append((recorded, event.body))
        versions[stream.job_id] = actual
        placed.append([known[event.event_id] for event in stream.events])
    return placed, new

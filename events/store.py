"""The event store: one stream of events for each job, all in one global order. `events.memory` and `events.sqlite`
implement it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol

from events.codec import AnyEvent, encode

NO_STREAM = -1
"""Version of a stream that has no event yet."""


class Recorded(NamedTuple):
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


class NewEvent(NamedTuple):
    """An event to be written, with its encoded text. One that can't be encoded is refused before it is in a batch."""

    event_id: str
    event: AnyEvent
    body: str

    @classmethod
    def of(cls, event_id: str, event: AnyEvent) -> "NewEvent":
        return cls(event_id, event, encode(event))


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
    """The store can't be read or written. After a failed write it has stopped, and it is unknown whether the write
    reached the disk: call `reopen`, read the events after the last acknowledged position, and only then go on."""


@dataclass(frozen=True, slots=True)
class Damage:
    """An event that can't be read as it was written: a flipped bit, a lost page, a row that is gone."""

    position: int
    """0: no event, but the store's own record of how many there are."""
    job_ids: tuple[str, ...]
    """The job that the event belongs to; several if the indexes disagree. Empty: unknown."""
    why: str


class JobDamagedError(Exception):
    """Events of the job are damaged or missing."""


class EventStore(Protocol):
    """Synchronous; calls must not overlap (`EventLog` makes them from one thread), but `backup`, `snapshot` and
    `keep_snapshot` may run beside the others. Any may raise StoreFailedError."""

    damage: dict[int, Damage]
    """By position: the damage that reads have found since the store was opened."""

    def last_position(self) -> int:
        """Of the last event; 0 when there is none."""
        ...

    def append(self, batch: Sequence[tuple[Recorded, str]]) -> None:
        """Writes all of the batch, each event with what `encode` made of it, or nothing; durably.

        The batch must begin at the position after `last_position` and, in each stream, at the version after the last.
        The caller makes sure that none of its event ids has been written before (`find`).

        Raises ValueError if the batch begins elsewhere (nothing was written), or StoreFailedError.
        """
        ...

    def find(self, event_ids: Collection[str]) -> dict[str, Recorded]:
        """The events with these ids that have been written. Damaged ones are left out and noted in `damage`."""
        ...

    def read_stream(self, job_id: str, after_version: int = -1, limit: int = 1000) -> list[Recorded]:
        """Events of one job in order, those after `after_version`. Empty for an unknown job.

        Raises JobDamagedError.
        """
        ...

    def read_all(self, after_position: int = 0, limit: int = 1000) -> list[Recorded]:
        """Events of all jobs in order, those after `after_position`. Damaged ones are left out and noted in `damage`.
        Empty only at the end of the log."""
        ...

    def check(self, after_position: int) -> int:
        """Checks the next few hundred events and the indexes that lead to them, notes what is wrong in `damage`, and
        returns the position reached: the last one once everything has been checked."""
        ...

    def snapshot(self) -> bytes | None:
        """What `keep_snapshot` was last given, unchecked; None if there is none."""
        ...

    def keep_snapshot(self, snapshot: bytes) -> None:
        """Replaces the snapshot. Raises OSError; the previous one is kept then."""
        ...

    def backup(self, file: Path) -> None:
        """Writes a copy of the store, as of a moment before it returns, without blocking the other calls.

        Raises FileExistsError, OSError or StoreFailedError; then there is no `file`.
        """
        ...

    def reopen(self) -> None:
        """After StoreFailedError: makes sure that everything that can be read is on disk. Raises StoreFailedError."""
        ...

    def close(self) -> None: ...


def check_places(batch: Sequence[tuple[Recorded, str]], last: int, last_version: Callable[[str], int]) -> None:
    """A check for every store's `append`. Raises ValueError if the batch does not begin where the store ends."""
    ends: dict[str, int] = {}
    for position, (recorded, _) in enumerate(batch, last + 1):
        job_id = recorded.job_id
        end = ends[job_id] if job_id in ends else last_version(job_id)
        if recorded.position != position or recorded.version != end + 1:
            raise ValueError(
                f"event {recorded.version} of job {job_id} at position {recorded.position} does not follow event {end} "
                f"of the job and position {position - 1} of the log"
            )
        ends[job_id] = recorded.version

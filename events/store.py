"""The event store: streams of events, one a job, in one global order. `events.memory` and `events.sqlite` keep it."""

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
    """An event to be written, already encoded: one that can't be is refused before it reaches a batch."""

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

    def append(self, batch: Sequence[tuple[Recorded, str]]) -> None:
        """Writes all of the batch, each event with what `encode` made of it, or nothing; durably.

        It goes on where the store ends: with the position after `last_position`, and in each stream with the version
        after the last. That no event id is there already is for the caller to see to (`find`).

        Raises ValueError when it goes on elsewhere (nothing was written), or StoreFailedError.
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

    def check(self, after_position: int) -> int:
        """Reads some hundred events more and all that leads to them, notes in `damage` what is wrong, and returns the
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


def check_places(batch: Sequence[tuple[Recorded, str]], last: int, last_version: Callable[[str], int]) -> None:
    """For every store's `append`. Raises ValueError when the batch does not go on where the store ends."""
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

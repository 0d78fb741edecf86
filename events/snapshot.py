"""Snapshots: all jobs as of a position, as JSON, so that a start folds only the events after it.

A snapshot is only a shortcut. It is not used if it is damaged, if other code has made it, or if it belongs to another
log (an older backup was restored); all events are then folded from the first one.

The first line is a CRC-32 of the rest. The second names the code and the event that was folded last; each further line
is one job, oldest first.
"""

import logging
import zlib
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import to_json

from events import codec, facts, frozen, job
from events.job import FineTuningJob
from events.jobs import Jobs
from events.store import EventStore, Recorded

logger = logging.getLogger(__name__)


class _Header(BaseModel):
    code: int
    position: int
    event_id: str
    time: datetime


def take(all_jobs: Sequence[FineTuningJob], last: Recorded) -> bytes:
    """`all_jobs`, oldest first, as they are after `last`."""
    header = _Header(code=_code(), position=last.position, event_id=last.event_id, time=last.time)
    body = b"\n".join([header.model_dump_json().encode(), *map(_line, all_jobs)])
    return b"%010d\n%b" % (zlib.crc32(body), body)


def restore(snapshot: bytes, store: EventStore) -> Jobs:
    """The jobs in a snapshot. Raises ValueError with the reason if the snapshot can't be used for this store."""
    checksum, _, body = snapshot.partition(b"\n")
    if not checksum.isdigit() or int(checksum) != zlib.crc32(body):
        raise ValueError("it is damaged")
    first, *lines = body.split(b"\n")
    header = _Header.model_validate_json(first)
    if header.code != _code():
        raise ValueError("it was made by another version of Tunewright")
    if [one.event_id for one in store.read_all(header.position - 1, 1)] != [header.event_id]:
        raise ValueError("it is of another log, or of events that this one has lost")
    return Jobs.of(header.position, header.time, map(FineTuningJob.model_validate_json, lines))


def restored(store: EventStore) -> Jobs | None:
    """The jobs in the store's snapshot; None if it has none that can be used."""
    snapshot = store.snapshot()
    if snapshot is None:
        return None
    try:
        return restore(snapshot, store)
    except ValueError as error:  # pydantic's ValidationError is one
        logger.warning("the snapshot of the event log is not used, all events are folded instead: %s", error)
        return None


def _line(one: FineTuningJob) -> bytes:
    """Every field of a job, including those that `model_dump` excludes. Raises ValueError for what JSON can't hold."""
    return to_json({name: getattr(one, name) for name in FineTuningJob.model_fields})


@cache
def _code() -> int:
    """A checksum of the code that folds: snapshots of other code are not used."""
    return zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in (codec, facts, frozen, job)))

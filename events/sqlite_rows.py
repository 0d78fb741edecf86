"""Events as rows of an SQLite table, each with a CRC-32 of its columns, which changes with any flipped bit."""

import zlib
from datetime import datetime
from functools import lru_cache

from events.codec import CorruptEventError, decode
from events.store import Recorded

COLUMNS = "position, job_id, version, event_id, time, event, checksum"
Row = tuple[int, str, int, str, str, str, int]


def checksum_of(*columns: object) -> int:
    """CRC-32 of the columns as text. Text that is read back as bytes, or an integer as a float, changes it, too."""
    return zlib.crc32("\0".join(map(str, columns)).encode(errors="surrogatepass"))


@lru_cache(maxsize=1)
def _text(time: datetime) -> str:
    """Cached, because all events of a commit have the same time."""
    return time.isoformat()


def row_of(new: tuple[Recorded, str]) -> Row:
    (position, job_id, version, event_id, time, _), body = new
    columns = position, job_id, version, event_id, _text(time), body
    return *columns, checksum_of(*columns)


def recorded_of(row: Row | None) -> Recorded | None:
    """The event in a row; None if there is no row, or it is damaged."""
    if row is None:
        return None
    position, job_id, version, event_id, time, body, checksum = row
    if checksum_of(position, job_id, version, event_id, time, body) != checksum:
        return None
    try:
        return Recorded(position, job_id, version, event_id, datetime.fromisoformat(time), decode(body))
    except (CorruptEventError, ValueError):  # of an older schema, damaged before there were checksums
        return None

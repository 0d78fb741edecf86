"""Finds transactions in SQLite's write-ahead log (WAL) that SQLite has dropped because of damage.

SQLite reads a WAL up to the first frame with a wrong checksum and drops the rest silently. That is right for a
transaction that was being written when the power failed. It is wrong after a flipped bit, if acknowledged transactions
follow. The two cases can be told apart: our WAL is always emptied as a whole, so all its frames are of one generation,
and a transaction begins only once the one before it is on disk. So at most one transaction may follow the readable
ones, the unfinished one.

A flipped bit in the last transaction can't be found here: it looks like a transaction that was never acknowledged. If
the process was killed and the machine went on, `events.db.lock` reveals it (see `events.sqlite`).

The format: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

import struct
from pathlib import Path

_HEADER = struct.Struct(">8I")  # magic, version, page size, sequence, salts, checksum
_FRAME = struct.Struct(">6I")  # page number, pages in the database if it ends a transaction, salts, checksum
_MAGIC = 0x377F0682
_BIG_ENDIAN = 1  # this bit of the magic number is the byte order of the summed words

Sum = tuple[int, int]


def lost_frames(wal: Path, recovered: int) -> str | None:
    """What is wrong with a WAL of which SQLite has accepted the first `recovered` frames. None: nothing can be found.

    A frame's checksum continues that of the frame before it, so each frame can be checked with the checksum stored in
    the one before.
    """
    try:
        content = wal.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) <= _HEADER.size:
        return None  # frames are written once the header is on disk
    magic, _, page_size, _, *salts, first, second = _HEADER.unpack_from(content)
    words = ">" if magic & _BIG_ENDIAN else "<"
    if magic | _BIG_ENDIAN != _MAGIC | _BIG_ENDIAN or _sum(content[:24], words, (0, 0)) != (first, second):
        return "its header is damaged"
    size = _FRAME.size + page_size
    before: Sum | None = None
    ended = False
    for start in range(_HEADER.size + recovered * size, len(content) - size + 1, size):
        _, pages, *frame_salts, first, second = _FRAME.unpack_from(content, start)
        known, before = before, (first, second)
        if known is None or frame_salts != salts:
            continue
        summed = _sum(content[start : start + 8], words, known)
        if _sum(content[start + _FRAME.size : start + size], words, summed) != before:
            continue
        if ended:
            return f"frame {recovered + 1} is damaged, or one soon after it, and transactions behind it are not"
        ended = pages > 0
    return None


def _sum(data: bytes, words: str, start: Sum) -> Sum:
    first, second = start
    values = struct.unpack(f"{words}{len(data) // 4}I", data)
    for even, odd in zip(values[::2], values[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second

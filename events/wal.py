"""What a write-ahead log of SQLite holds, read by ourselves before SQLite does.

SQLite takes a WAL up to the first frame whose checksum is wrong and forgets the rest without a word. That is right for
a transaction that was being written when the power went. It is wrong after a flipped bit, when transactions behind it
were acknowledged. The two can be told apart: our WAL is emptied as a whole, so all its frames are of one generation,
and a transaction is begun only once the one before it is on disk. So there may be one transaction behind the readable
ones, the unfinished one, and never a second.

What can't be told from here is a flipped bit in the last transaction: that looks like one that was never acknowledged.
Where the process was killed and the machine went on, `events.db.lock` knows (see `events.sqlite`).

The format: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

import struct
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct(">8I")  # magic, version, page size, sequence, salts, checksum
_FRAME = struct.Struct(">6I")  # page number, pages in the database if it ends a transaction, salts, checksum
_MAGIC = 0x377F0682
_BIG_ENDIAN = 1  # the bit of the magic number that says how words are summed


@dataclass(frozen=True, slots=True)
class Frames:
    """What is in the file, by its frame headers alone. `ends`: which frames, from 1, end a transaction."""

    readable_header: bool
    count: int
    ends: tuple[int, ...]

    def lost_after(self, recovered: int) -> str | None:
        """What is wrong when SQLite found only the first `recovered` frames good; None when that may be right."""
        if self.count and not self.readable_header:
            return f"the header of the write-ahead log is damaged, and with it {self.count} pages"
        behind = [end for end in self.ends if end > recovered]
        if behind and self.count > behind[0]:
            return f"page {recovered + 1} of {self.count} in the write-ahead log is damaged, or one soon after it"
        return None


def read_frames(wal: Path) -> Frames:
    """Of a file that may not exist."""
    try:
        file = wal.open("rb")
    except FileNotFoundError:
        return Frames(True, 0, ())
    with file:
        header = file.read(_HEADER.size)
        size = file.seek(0, 2)
        if len(header) < _HEADER.size:
            return Frames(True, 0, ())
        magic, _, page_size, _, *salts, sum_1, sum_2 = _HEADER.unpack(header)
        if magic | _BIG_ENDIAN != _MAGIC | _BIG_ENDIAN or _checksum(header[:24], magic) != (sum_1, sum_2):
            return Frames(False, (size - _HEADER.size) // (_FRAME.size + 512), ())
        count, ends = 0, []
        for number in range(1, (size - _HEADER.size) // (_FRAME.size + page_size) + 1):
            file.seek(_HEADER.size + (number - 1) * (_FRAME.size + page_size))
            _, pages, *frame_salts, _, _ = _FRAME.unpack(file.read(_FRAME.size))
            if frame_salts == salts:
                count = number
                if pages:
                    ends.append(number)
        return Frames(True, count, tuple(ends))


def _checksum(data: bytes, magic: int) -> tuple[int, int]:
    words = struct.unpack(f"{'>' if magic & _BIG_ENDIAN else '<'}{len(data) // 4}I", data)
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second

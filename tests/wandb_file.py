"""Reads the file that an offline run of W&B leaves."""

import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 1 << 15


def end_of(run: Path) -> tuple[int | None, bool]:
    """The exit code of the run in a directory (None: it didn't end), and whether it was marked as preempted."""
    (file,) = run.glob("*.wandb")
    records = [Record.FromString(record) for record in _records(file.read_bytes())]
    codes = [record.exit.exit_code for record in records if record.HasField("exit")]
    return codes[-1] if codes else None, any(record.HasField("preempting") for record in records)


def _records(data: bytes) -> list[bytes]:
    """The records of a file in LevelDB's log format, after a header of 7 bytes. Each piece of a record has a checksum,
    a length and a kind (1: a whole record; 2, 3, 4: the beginning, middle and end of one)."""
    found, begun, at = list[bytes](), b"", 7
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        begun += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            found.append(begun)
            begun = b""
    return found

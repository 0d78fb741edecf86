"""What an offline run of W&B has on disk."""

import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 1 << 15


def end_of(run: Path) -> tuple[int | None, bool]:
    """Of a run's directory: the exit code it ended with (None: it didn't), and whether it was marked as preempted."""
    (file,) = run.glob("*.wandb")
    records = [Record.FromString(record) for record in _records(file.read_bytes())]
    codes = [record.exit.exit_code for record in records if record.HasField("exit")]
    return codes[-1] if codes else None, any(record.HasField("preempting") for record in records)


def _records(data: bytes) -> list[bytes]:
    """A LevelDB log, whose header is 7 bytes of the first block: each piece has a checksum, its length and its kind (1:
    all of a record; 2, 3, 4: its beginning, middle and end)."""
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

"""Records a process's writes and syncs with strace, and simulates what a power cut at any moment may leave of them.

The model of the disk: data written before a sync of its file is on disk. Of data written since, each sector of 512
bytes may be there, be missing, or be garbage, independently of the order of writes. Only a change of a file's size
keeps its place among the writes to that file, as journaling file systems ensure. Until its directory is synced, a new
file may be missing, and a removed one may still be there.
"""

import random
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SECTOR = 512
_CALL = re.compile(rb"(?:\[pid +\d+\] )?(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
_FD = re.compile(rb"^(\d+)<(.*?)>")
_HEX = re.compile(rb'"((?:\\x[0-9a-f]{2})*)"(?:, (\d+))?(?:, (\d+))?$')

STRACE = shutil.which("strace") or "strace"
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (Debian: strace)")


@dataclass(frozen=True)
class Write:
    file: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    file: str
    size: int


@dataclass(frozen=True)
class Create:
    file: str


@dataclass(frozen=True)
class Remove:
    file: str


@dataclass(frozen=True)
class Sync:
    file: str  # "" is the directory


@dataclass(frozen=True)
class Said:
    """The process wrote this to its standard output: an acknowledgement, which others rely on from then on."""

    text: str


Step = Write | Resize | Create | Remove | Sync | Said


def record(command: Sequence[str], directory: Path, trace: Path) -> list[Step]:
    """Runs the command under strace. Returns its changes to the files of `directory` and its output, in order."""
    calls = "pwrite64,write,fsync,fdatasync,ftruncate,openat,unlink,rename,writev,pwritev,fallocate,lseek"
    strace = [
        "strace",
        "-f",
        "-y",
        "-xx",
        "-s",
        "1000000",
        "-e",
        f"trace={calls}",
        "-e",
        "signal=none",
        "-o",
        str(trace),
    ]
    subprocess.run([*strace, *command], check=True, stdout=subprocess.DEVNULL, timeout=200)
    return list(_steps(trace.read_bytes().splitlines(), str(directory).encode()))


def _steps(lines: Iterable[bytes], directory: bytes) -> Iterator[Step]:
    known: set[str] = set()
    for line in lines:
        match = _CALL.search(line)
        if match is None or match[3].startswith(b"-"):
            continue
        call, arguments = match[1], match[2]
        if call in (b"openat", b"unlink"):
            path = b"".join(re.findall(rb'"(.*?)"', arguments)).decode("unicode_escape").encode()
            name = path.removeprefix(directory + b"/").decode()
            if not path.startswith(directory + b"/"):
                continue
            if call == b"unlink":
                known.discard(name)
                yield Remove(name)
            elif b"O_CREAT" in arguments and name not in known:
                known.add(name)
                yield Create(name)
            continue
        opened = _FD.match(arguments)
        if opened is None:
            continue
        path = opened[2].decode("unicode_escape").encode()
        if call == b"write" and opened[1] == b"1":
            yield Said(_data(arguments)[0].decode())
        if path != directory and not path.startswith(directory + b"/"):
            continue
        name = path.removeprefix(directory).removeprefix(b"/").decode()
        if call in (b"fsync", b"fdatasync"):
            yield Sync(name)
        elif call == b"ftruncate":
            yield Resize(name, int(arguments.rsplit(b", ", 1)[1]))
        elif call == b"pwrite64":
            data, offset = _data(arguments)
            assert len(data) == int(match[3])
            yield Write(name, offset, data)
        else:
            assert call == b"lseek", f"this recorder does not know {line!r}"


def _data(arguments: bytes) -> tuple[bytes, int]:
    match = _HEX.search(arguments)
    assert match is not None, arguments[:100]
    return bytes.fromhex(match[1].replace(b"\\x", b"").decode()), int(match[3] or 0)


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Write | Resize] = field(default_factory=list)
    named: bool = False
    """Whether the directory was synced since the file was created."""
    removed: bool = False


class Disk:
    """A simulated disk: `play` applies steps, and `crash` shows what a power cut would leave."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}

    def play(self, step: Step) -> None:
        match step:
            case Create(name):
                self._files.setdefault(name, _File())
            case Remove(name):
                self._files[name].removed = True
            case Write(name) | Resize(name):
                self._files[name].pending.append(step)
            case Sync(""):
                self._files = {name: file for name, file in self._files.items() if not file.removed}
                for file in self._files.values():
                    file.named = True
            case Sync(name):
                file = self._files[name]
                for pending in file.pending:
                    _apply(file.durable, pending)
                file.pending.clear()

    def crash(self, directory: Path, chance: random.Random) -> None:
        """Writes the files after a power cut into `directory`: with all unsynced changes, some or none, at random."""
        mood = chance.choice(["kept", "lost", "mixed", "mixed", "mixed"])
        for name, file in self._files.items():
            if (file.removed and mood == "kept") or ((file.removed or not file.named) and chance.random() < 0.5):
                continue
            content = bytearray(file.durable)
            for pending in _survivors(file.pending, mood, chance):
                _apply(content, pending)
            (directory / name).write_bytes(content)


def _survivors(pending: list[Write | Resize], mood: str, chance: random.Random) -> Iterator[Write | Resize]:
    if mood == "lost":
        return
    sectors: list[Write] = []
    for one in pending:
        if isinstance(one, Write):
            sectors += _sectors(one)
            continue
        yield from _some(sectors, mood, chance)
        sectors = []
        if mood == "mixed" and chance.random() < 0.3:
            return  # this change of the size is lost, and all after it
        yield one
    yield from _some(sectors, mood, chance)


def _some(sectors: list[Write], mood: str, chance: random.Random) -> Iterator[Write]:
    """The sectors that survive. If the mood is `kept`: all, as written. Else some, partly garbage, and in any order,
    since of two writes to one sector either may have been the last."""
    if mood == "kept":
        yield from sectors
        return
    share = chance.choice([0.1, 0.5, 0.9, 0.99])
    for one in chance.sample(sectors, len(sectors)):
        if chance.random() < share:
            yield one
        elif chance.random() < 0.3:
            yield Write(one.file, one.offset, chance.randbytes(len(one.data)))


def _sectors(write: Write) -> Iterator[Write]:
    end = write.offset + len(write.data)
    start = write.offset
    while start < end:
        stop = min(start - start % SECTOR + SECTOR, end)
        yield Write(write.file, start, write.data[start - write.offset : stop - write.offset])
        start = stop


def _apply(content: bytearray, step: Write | Resize) -> None:
    match step:
        case Write(_, offset, data):
            content.extend(bytes(max(offset + len(data) - len(content), 0)))
            content[offset : offset + len(data)] = data
        case Resize(_, size):
            del content[size:]
            content.extend(bytes(size - len(content)))

"""A cache of tokenised data, for later jobs on the same data.

An entry is a directory whose name is a hash of everything its content depends on. Jobs get hard links to its files
(copies if the file system has no hard links): nothing is stored twice, and a job keeps its data when the entry is
evicted.
"""

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from trainers.models.cache import lock_file, make_once

Make = Callable[[Path], None]


class DataCache:
    """Entries in `directory`, of at most `max_bytes` in total; the least recently used are evicted first."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes

    def fetch(self, key: str, make: Make, into: Path, log: Callable[[str], None]) -> None:
        """Puts the files of entry `key` into the directory `into`. If there is no such entry, `make` makes it. Any
        number of processes may ask for the same entry: it is made once, and an entry is always complete."""
        while not self._linked(make_once(self._directory / key, _or_nothing(make), log), into):
            pass  # evicted between the two
        self._evict()

    def _linked(self, entry: Path, into: Path) -> bool:
        try:
            os.utime(entry)
            for file in sorted(entry.iterdir()):
                target = into / file.name
                target.unlink(missing_ok=True)
                try:
                    target.hardlink_to(file)
                except FileNotFoundError:
                    raise
                except OSError:
                    shutil.copyfile(file, target)
        except FileNotFoundError:
            return False
        return True

    def _evict(self) -> None:
        for left in self._directory.glob(".*.partial"):  # left by a killed run, unless another process holds the lock
            self._remove(left, lock_file(left.with_name(left.name[1:].removesuffix(".partial"))))
        for left in self._directory.glob(".*.evicted"):
            shutil.rmtree(left, ignore_errors=True)
        entries = sorted(filter(None, map(_use, self._directory.glob("[!.]*"))))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries:
            if total <= self._max_bytes:
                break
            self._remove(entry, lock_file(entry))
            total -= size
        for lock in self._directory.glob(".*.lock"):
            self._remove_unused(lock)

    def _remove(self, directory: Path, lock: Path) -> None:
        try:
            with FileLock(lock, mode=0o644, timeout=0):
                gone = self._directory / f".{uuid.uuid4().hex}.evicted"
                directory.rename(gone)
        except (Timeout, FileNotFoundError):
            return
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_unused(self, lock: Path) -> None:
        """Deletes a lock file if there is no entry for it and nobody is making one. Safe because only the holder of the
        lock deletes it: a process that opened the file before and locks it after notices (filelock looks at the number
        of links) and tries again with a new file."""
        entry = lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))
        if entry.exists():
            return
        with suppress(OSError), FileLock(lock, mode=0o644, timeout=0):  # filelock's Timeout is one, too
            if not entry.exists():
                lock.unlink()


def _or_nothing(make: Make) -> Make:
    """`make`, but it leaves nothing behind when it fails."""

    def made(directory: Path) -> None:
        try:
            make(directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    return made


def _use(entry: Path) -> tuple[float, int, Path] | None:
    """When an entry was last used, its size in bytes, and the entry; None if it is gone, or isn't an entry."""
    try:
        return entry.stat().st_mtime, sum(file.stat().st_size for file in entry.iterdir()), entry
    except (FileNotFoundError, NotADirectoryError):
        return None

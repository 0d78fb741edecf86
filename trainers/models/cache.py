"""Directories that are made once and then shared by jobs: of one machine or, on a shared file system, of several."""

import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from events.disk import sync_path, sync_tree
from trainers.errors import storage_errors

ABANDONED_S = 24 * 3600.0
"""Seconds without a change after which nobody is expected to finish a partial directory."""


def make_once(final: Path, make: Callable[[Path], None], log: Callable[[str], None]) -> Path:
    """Returns `final`, and makes it with `make` if it doesn't exist. A directory of that name is always complete, even
    after a power cut.

    `make(partial)` fills a hidden directory beside `final`, which is then renamed. A file lock lets only one process at
    a time make it; others log that they wait. If an attempt fails or its process dies, the next one gets the same
    partial directory, so that downloads can go on where they stopped; `make` must cope with whatever it contains.

    Raises InfrastructureError `storage_full` or `storage_unreachable`, and what `make` raises.
    """
    if final.is_dir():
        return final
    with storage_errors():
        _make(final, make, log)
    return final


def _make(final: Path, make: Callable[[Path], None], log: Callable[[str], None]) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file(final), mode=0o644)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"another process is fetching {final.name}; waiting for it")
        lock.acquire()
    try:
        if not final.is_dir():
            partial = final.with_name(f".{final.name}.partial")
            partial.mkdir(exist_ok=True)
            make(partial)
            sync_tree(partial)
            partial.rename(final)
            sync_path(final.parent)
    finally:
        lock.release()


def lock_file(final: Path) -> Path:
    """The file that is locked while `final` is made."""
    return final.with_name(f".{final.name}.lock")


def delete_abandoned(cache_dir: Path, patterns: Iterable[str]) -> None:
    """Deletes partial directories of `make_once` that nothing has changed in for `ABANDONED_S` and whose lock is free,
    among those under `cache_dir` that match `patterns`. One that can't be read or deleted is left for the next call.

    Both conditions matter. The lock protects a download that has stalled; the age protects one on another node, as some
    shared file systems keep locks per node. The empty lock file stays: a process may be waiting for the lock on it.
    """
    for pattern in patterns:
        with suppress(OSError):
            for partial in cache_dir.glob(pattern):
                with suppress(OSError):
                    _delete_if_abandoned(partial)


def _delete_if_abandoned(partial: Path) -> None:
    lock = lock_file(partial.with_name(partial.name[1:].removesuffix(".partial")))
    if _is_old(partial):
        with suppress(Timeout), FileLock(lock, mode=0o644, timeout=0):
            if _is_old(partial):  # an attempt may have begun and ended in between
                shutil.rmtree(partial)


def _is_old(partial: Path) -> bool:
    newest = max(path.lstat().st_mtime for path in (partial, *partial.rglob("*")))
    return time.time() - newest > ABANDONED_S

"""Directories that are made once and then shared: by jobs of one machine and, on a shared file system, of many."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from events.disk import sync_path, sync_tree
from trainers.errors import storage_errors


def make_once(final: Path, make: Callable[[Path], None], log: Callable[[str], None]) -> Path:
    """`final`, made by `make` where it isn't there yet; a directory of that name is always complete, also after a power
    cut.

    `make(partial)` fills a directory beside it, which is then renamed. Only one process makes it at a time; others
    wait, and say so. What an attempt that died has left is handed to the next one, so downloads go on where they
    stopped; `make` must cope with it.

    Raises InfrastructureError `storage_full` or `storage_unreachable`, and what `make` does.
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
    """What is locked while `final` is made."""
    return final.with_name(f".{final.name}.lock")

"""The temporary directory of a local service: logs and sockets of its Ray head.

A service deletes its directory when it stops. One that is killed can't, so the next service that starts does. The
process that starts a service locks a file in the directory, and its Ray head inherits the lock: where nobody holds it,
both have ended. That holds across containers that share /tmp but don't see each other's processes.
"""

import fcntl
import os
import shutil
import stat
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

import psutil

LOCK_FILE = "service.lock"
PREFIX = "tw-"


def lock_directory(directory: Path) -> BufferedWriter:
    """Marks a directory as a service's, which lives until every process that has the returned file open closes it."""
    draft = directory / f"{LOCK_FILE}.new"
    lock = draft.open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    draft.rename(directory / LOCK_FILE)  # nobody sees it unlocked
    return lock


def delete_abandoned(parent: Path) -> None:
    """Deletes the directories in `parent` of this user's services that have ended. One without a lock file may be
    anybody's, and stays; so does one that a process still uses."""
    for directory in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it has no lock file, or its lock is held
            _delete_if_abandoned(directory)


def _delete_if_abandoned(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    with os.fdopen(os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _in_use(directory):
            shutil.rmtree(directory, ignore_errors=True)


def _in_use(directory: Path) -> bool:
    """Whether a process was told to work there: those that a Ray head started may outlive it."""
    return any(
        str(directory) in " ".join(process.info["cmdline"] or ())
        or (process.info["environ"] or {}).get("RAY_TMPDIR") == str(directory)
        for process in psutil.process_iter(["cmdline", "environ"])
    )

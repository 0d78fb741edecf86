"""fsync, so that files outlast a power cut."""

import os
from pathlib import Path


def sync_path(path: Path | str) -> None:
    """Writes a file, or a directory's entries, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(directory: Path) -> None:
    """Writes everything in a directory to disk, except the directory's own name, which is an entry of its parent."""
    for entry in [*directory.rglob("*"), directory]:
        sync_path(entry)

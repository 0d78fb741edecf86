"""What is to outlast a power cut."""

import os
from pathlib import Path


def sync_path(path: Path | str) -> None:
    """A file, or a directory's entries, is on disk when this returns."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(directory: Path) -> None:
    """All that is in a directory is on disk when this returns; the directory's own name is its parent's."""
    for entry in [*directory.rglob("*"), directory]:
        sync_path(entry)

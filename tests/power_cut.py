"""Finds out from the calls of fsync which files would survive a power cut."""

import os
from pathlib import Path

import pytest


class PowerCut:
    """Records every fsync from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._on_disk: dict[int, object] = {}  # by inode: the content when it was last synced
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            fsync(descriptor)
            self._on_disk[os.fstat(descriptor).st_ino] = _content(Path(f"/proc/self/fd/{descriptor}"))

        monkeypatch.setattr(os, "fsync", noted)

    def leaves(self, path: Path) -> bool:
        """Whether `path` and everything in it would survive, provided that its parent directory does."""
        names = self._on_disk.get(path.parent.stat().st_ino)
        return isinstance(names, set) and (path.name, path.stat().st_ino) in names and self.leaves_content(path)

    def leaves_content(self, path: Path) -> bool:
        """As `leaves`, but `path` itself may be missing from its directory."""
        return all(self._on_disk.get(entry.stat().st_ino) == _content(entry) for entry in [path, *path.rglob("*")])


def _content(path: Path) -> object:
    """The names in a directory, with their inodes; the size of a file."""
    return {(entry.name, entry.stat().st_ino) for entry in path.iterdir()} if path.is_dir() else path.stat().st_size

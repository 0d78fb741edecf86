"""Tokenised rows on disk, read through memory maps: no row is in memory before it is asked for.

A directory holds `tokens.bin` (int32, all rows one after the other), `mask.bin` (uint8, one per token: 1 if the token
is a training target), `offsets.bin` (int64, rows + 1: row i is [offsets[i], offsets[i + 1])) and `report.json` (a
DataReport). All little-endian. `prepare` writes the directory, and renames it into place when it is complete.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from events.facts import DataReport

TOKENS, MASK, OFFSETS, REPORT = "tokens.bin", "mask.bin", "offsets.bin", "report.json"
TOKEN_TYPE, MASK_TYPE, OFFSET_TYPE = np.dtype("<i4"), np.dtype("u1"), np.dtype("<i8")
_COUNTED_AT_ONCE = 1 << 16  # rows: numpy may widen every byte of the mask to eight


class TokenisedDataset:
    """The rows of one directory. Never empty, because `prepare` refuses data without a valid row. Can be pickled: the
    copy maps the same files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[type["TokenisedDataset"], tuple[Path]]:
        return type(self), (self.directory,)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Row i: tokens [n] and mask [n], where mask[j] says that predicting tokens[j] counts in the loss. Read-only
        views of the files."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        start, end = self._offsets[i], self._offsets[i + 1]
        return self._tokens[start:end], self._mask[start:end].view(np.bool_)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row [rows]."""
        return np.diff(self._offsets)

    @cached_property
    def trained(self) -> NDArray[np.int64]:
        """Trained tokens of each row [rows]. The first token of a row never counts, because nothing predicts it."""
        counts = np.empty(len(self), dtype=np.int64)
        for first in range(0, len(self), _COUNTED_AT_ONCE):
            last = min(first + _COUNTED_AT_ONCE, len(self))
            starts, end = self._offsets[first:last], self._offsets[last]
            counts[first:last] = np.add.reduceat(self._mask[starts[0] : end], starts - starts[0], dtype=np.int64)
        counts -= self._mask[self._offsets[:-1]]
        return counts

    @cached_property
    def report(self) -> DataReport:
        return DataReport.model_validate_json((self.directory / REPORT).read_bytes())

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        return np.fromfile(self.directory / OFFSETS, dtype=OFFSET_TYPE)

    @cached_property
    def _tokens(self) -> NDArray[np.int32]:
        return np.memmap(self.directory / TOKENS, dtype=TOKEN_TYPE, mode="r").view(np.ndarray)

    @cached_property
    def _mask(self) -> NDArray[np.uint8]:
        return np.memmap(self.directory / MASK, dtype=MASK_TYPE, mode="r").view(np.ndarray)

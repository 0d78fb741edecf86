"""The schedule: which rows each step trains on, and how they are divided among ranks and micro-batches.

An item is a row; with packing, a pack of rows; with preference data, a pair of rows, 2i (chosen) and 2i + 1 (rejected).
The order of the items in an epoch depends on the seed, the epoch and the size of a step. A step takes the next `world *
batch_size * accumulation` items, and the ranks take them in turn, so a global batch of the same size trains the same on
any number of workers. The last step of an epoch takes the rest: no row is dropped or carried over to the next epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch


def pack(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Divides rows of `lengths` tokens, in order, into packs of at most `size` tokens (next-fit). A pack is an array of
    row indices. Raises ValueError if a row is longer than `size`."""
    ends = np.cumsum(lengths)
    packs, start, used = [], 0, 0
    while start < len(lengths):
        end = int(np.searchsorted(ends, used + size, side="right"))
        if end == start:
            message = f"row {start} has {lengths[start]} tokens, more than a pack's {size}"
            raise ValueError(message)
        packs.append(np.arange(start, end))
        start, used = end, int(ends[end - 1])
    return packs


@dataclass(frozen=True)
class Progress:
    """The position in a run: `step` steps and `epoch` epochs completed; of the current epoch, `epoch_steps` steps and
    `epoch_items` items completed (both 0 between epochs).

    `epoch_grouping`: with grouping by length, the number of items of a step when the current epoch began; otherwise 0.
    It keeps the order of that epoch if the run is resumed with steps of another size.
    """

    step: int = 0
    epoch: int = 0
    epoch_steps: int = 0
    epoch_items: int = 0
    epoch_grouping: int = 0

    @property
    def between_epochs(self) -> bool:
        return self.epoch_items == 0


class StepItems(NamedTuple):
    """One step: this rank's items by micro-batch (some may be empty), each an array of rows, and the progress after the
    step. `epoch`: index of its epoch, from 0. `trained`: trained tokens, or pairs, of the step over all ranks."""

    epoch: int
    micro_batches: list[list[np.ndarray]]
    after: Progress
    trained: int


_WINDOW_STEPS = 64
"""With grouping by length, rows are sorted within windows of this many steps: few enough that a window is a random
sample of the epoch, enough that the rows of a step have nearly the same length."""


class Schedule:
    """All steps of a run over rows with `lengths` [rows] tokens, of which `trained` [rows] are trained.

    `batch_size` is per worker and micro-batch. `shuffle_seed` None keeps the rows in order. `pack_to`: tokens of a
    pack; None: no packing. `group_by_length`: a step has rows of similar length, so that ranks wait less for each
    other. Every epoch still has every row once, and the rows that don't fill a step at its end are a random sample.
    `pairs`: rows 2i and 2i + 1 are one item, whose length is that of the longer row.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        trained: np.ndarray,
        *,
        n_epochs: int,
        batch_size: int,
        accumulation: int = 1,
        max_steps_per_epoch: int | None = None,
        shuffle_seed: int | None = None,
        pack_to: int | None = None,
        group_by_length: bool = False,
        pairs: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._pairs = pairs
        self._lengths = _of_pairs(lengths) if pairs else lengths
        self._trained = np.ones(len(self._lengths), dtype=np.int64) if pairs else trained
        self._n_epochs = n_epochs
        self._micro_rows = batch_size * world
        self._step_rows = batch_size * world * accumulation
        self._max_steps = max_steps_per_epoch
        self._seed = shuffle_seed
        self._grouping = self._step_rows if group_by_length else 0
        self._rank, self._world = rank, world
        self._packs = self._packed(pack_to) if pack_to else None
        self.n_items = len(self._lengths) if self._packs is None else len(self._packs)

    def total_steps(self, progress: Progress) -> int:
        """The number of steps of the whole run: those of `progress`, and those still to come with this schedule."""
        if progress.epoch >= self._n_epochs:
            return progress.step
        later_epochs = self._n_epochs - progress.epoch - 1
        return progress.step + self._steps_left(progress) + later_epochs * self._steps_left(Progress())

    def steps(self, progress: Progress) -> Iterator[StepItems]:
        """The steps after `progress`, to the end of the last epoch."""
        while progress.epoch < self._n_epochs:
            epoch = progress.epoch
            if progress.between_epochs:
                progress = replace(progress, epoch_grouping=self._grouping)
            order = self._order(epoch, progress.epoch_grouping)
            for left in range(self._steps_left(progress), 0, -1):
                taken = order[progress.epoch_items : progress.epoch_items + self._step_rows]
                progress = _advanced(progress, len(taken)) if left > 1 else Progress(progress.step + 1, epoch + 1)
                items = [self._rows_of(item) for item in taken]
                counted = taken if self._packs is None else np.concatenate(items)
                trained = int(self._trained[counted].sum())
                yield StepItems(epoch, self._shares(items), progress, trained)

    def _steps_left(self, progress: Progress) -> int:
        """The number of steps left in the current epoch; at least one."""
        left = -(-(self.n_items - progress.epoch_items) // self._step_rows)
        if self._max_steps is not None:
            left = min(left, self._max_steps - progress.epoch_steps)
        return max(left, 1)

    def _order(self, epoch: int, grouping: int) -> np.ndarray:
        """The indices of the items in the order of `epoch`. Without grouping it is that of torch's DistributedSampler.

        With grouping, that order is cut into windows of `_WINDOW_STEPS` steps of `grouping` items. Each window is
        sorted by length and cut into steps; then the steps of all windows are shuffled. Items that don't fill a step
        stay last, sorted by length.
        """
        if self._seed is None:
            return np.arange(self.n_items)
        generator = torch.Generator().manual_seed(self._seed + epoch)
        order = torch.randperm(self.n_items, generator=generator).numpy()
        if not grouping:
            return order
        n_steps = self.n_items // grouping
        rows, tail = order[: n_steps * grouping], order[n_steps * grouping :]
        window = np.arange(len(rows)) // (_WINDOW_STEPS * grouping)
        steps = rows[np.lexsort((self._lengths[rows], window))].reshape(n_steps, grouping)
        shuffled = steps[torch.randperm(n_steps, generator=generator).numpy()].reshape(-1)
        return np.concatenate([shuffled, tail[np.argsort(self._lengths[tail], kind="stable")]])

    def _packed(self, size: int) -> list[np.ndarray]:
        """The packs, the same in all epochs. If rows are shuffled, they are shuffled before packing, too: neighbours in
        the file are often alike, and would be in one batch in every epoch."""
        order = np.arange(len(self._lengths))
        if self._seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self._seed)).numpy()
        return [order[places] for places in pack(self._lengths[order], size)]

    def _rows_of(self, item: int) -> np.ndarray:
        if self._packs is not None:
            return self._packs[item]
        return rows_of_pair(item) if self._pairs else np.array([item])

    def _shares(self, items: list[np.ndarray]) -> list[list[np.ndarray]]:
        """This rank's items of a step, by micro-batch. The ranks take the items of a micro-batch in turn."""
        starts = range(0, len(items), self._micro_rows)
        return [items[start : start + self._micro_rows][self._rank :: self._world] for start in starts]


def _advanced(progress: Progress, items: int) -> Progress:
    return replace(
        progress,
        step=progress.step + 1,
        epoch_steps=progress.epoch_steps + 1,
        epoch_items=progress.epoch_items + items,
    )


def _of_pairs(lengths: np.ndarray) -> np.ndarray:
    """The lengths of pairs [rows / 2] from those of their rows."""
    longer: np.ndarray = lengths.reshape(-1, 2).max(axis=1)
    return longer


def rows_of_pair(pair: int) -> np.ndarray:
    """The rows of a pair: chosen, rejected."""
    return np.array([2 * pair, 2 * pair + 1])


def evaluation_batches(
    lengths: np.ndarray, batch_size: int, rank: int, world: int, *, pairs: bool = False
) -> list[list[np.ndarray]]:
    """This rank's batches of an evaluation, each a list of items (arrays of rows). An item is a row, or with `pairs` a
    pair; every item is on one rank, once. All ranks have the same number of batches, some of which may be empty. Items
    of similar length are in one batch."""
    if pairs:
        batches = evaluation_batches(_of_pairs(lengths), batch_size, rank, world)
        return [[rows_of_pair(int(item[0])) for item in batch] for batch in batches]
    order = np.argsort(lengths, kind="stable")
    starts = range(0, len(order), batch_size * world)
    shares = [order[start : start + batch_size * world][rank::world] for start in starts]
    return [[np.array([row]) for row in share] for share in shares]

"""Collates the rows of a micro-batch into one line of tokens that holds each position that the loss needs, once.

- The rows are concatenated, so they need no padding to a common length.
- A row is cut after the last position that predicts a trained token: the loss doesn't depend on the rest.
- A prefix that several rows have in common (a system prompt, the prompt of a pair) is in the line once, and all these
  rows attend to it: a causal model computes the same for it in every row. So the line is a tree of segments, and each
  segment attends to itself and its ancestors.

For example (with letters for stretches of tokens), the rows ABCD and ABEF become the segments AB, CD and EF; CD and EF
both attend to AB, but not to each other. Losses and gradients are those of the rows by themselves, up to the order of
sums.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainers.planning.memory import ROUND_BF16

IGNORED = -100
"""The label of a position that is not trained."""
ROUND = 128
"""Positions in a block of FlexAttention. On CUDA, lines are padded to a multiple of it."""
LEAST_SHARED = 8
"""The shortest prefix, in tokens, that rows share: a shorter one isn't worth a segment of its own."""


class Rows(Protocol):
    """The part of `TokenisedDataset` that is used here. A row is its tokens [n] and their mask [n]: whether predicting
    each token counts in the loss."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...
    @property
    def lengths(self) -> np.ndarray: ...


class Segment(NamedTuple):
    """Positions [start, end) of a line. Each attends to the positions of the segment up to itself, and to all positions
    of the segments `before` it: its ancestors, from the beginning of the row, as (start, end)."""

    start: int
    end: int
    before: tuple[tuple[int, int], ...] = ()

    @property
    def seen(self) -> int:
        """The number of positions that its last position attends to."""
        return self.end - self.start + sum(end - start for start, end in self.before)


class Layout(NamedTuple):
    """Which positions of a line attend to which, in two forms.

    `segments` cover the line up to its padding, in depth-first order of the tree. For single positions, both [1, s]:
    `positions` are those within the row, from 0, and `until` says that position k is attended to by the positions
    k <= q < until[k] (the end of its subtree). A position of the padding attends to itself.
    """

    segments: tuple[Segment, ...]
    positions: Tensor
    until: Tensor


class Batch(NamedTuple):
    """One micro-batch: a line of s tokens of which n positions are trained.

    - `tokens` [1, s]: the line.
    - `trained` [n]: the positions that have a loss; `labels` [n]: the tokens that they predict.
    - `wanted` [m]: `trained`, padded with position 0 by `to` to a multiple of its rounding. The model's last layer
      computes these positions. m is at least 1 where n is 0.
    - `layout`: which positions attend to which.
    - `n_tokens`: tokens of the rows, uncut, shared ones counted in each row.
    - `n_trained`: number of trained tokens, or of pairs, over which the loss is a mean.

    For pairs (DPO), whose rows are chosen and rejected in turn:
    - `reference` [rows]: log-probability of each row's trained tokens under the reference model.
    - `places` [n]: index of each trained token in a flattened matrix [rows, `longest`] of the trained tokens by row.
    - `longest`: the number of trained tokens of the row with most.
    """

    tokens: Tensor
    labels: Tensor
    trained: Tensor
    wanted: Tensor
    layout: Layout
    n_tokens: int
    n_trained: int
    reference: Tensor | None = None
    places: Tensor | None = None
    longest: int = 0

    def to(self, device: torch.device, computed_in: torch.dtype) -> "Batch":
        """The batch on `device`, without waiting for the copy. The line and `wanted` are padded to a multiple of
        `ROUND` on CUDA and of `ROUND_BF16` in bf16 on a CPU, as kernels are prepared for each width there."""
        rounded_to = ROUND if device.type == "cuda" else ROUND_BF16 if computed_in == torch.bfloat16 else 1
        batch = self.padded(-(-self.tokens.shape[1] // rounded_to) * rounded_to)
        more = -len(self.trained) % rounded_to if len(self.trained) else rounded_to
        batch = batch._replace(wanted=functional.pad(self.trained, (0, more)))
        if device.type == "cpu":
            return batch
        return batch._replace(
            tokens=_sent(batch.tokens, device),
            labels=_sent(batch.labels, device),
            trained=_sent(batch.trained, device),
            wanted=_sent(batch.wanted, device),
            layout=batch.layout._replace(
                positions=_sent(batch.layout.positions, device), until=_sent(batch.layout.until, device)
            ),
            reference=None if batch.reference is None else _sent(batch.reference, device),
            places=None if batch.places is None else _sent(batch.places, device),
        )

    def padded(self, width: int) -> "Batch":
        """With the line padded to `width` positions, if it has fewer."""
        now = self.tokens.shape[1]
        if now >= width:
            return self
        zeros = torch.zeros(1, width - now, dtype=torch.int64)
        itself = torch.arange(now + 1, width + 1)[None]
        layout = self.layout._replace(
            positions=torch.cat([self.layout.positions, zeros], 1), until=torch.cat([self.layout.until, itself], 1)
        )
        return self._replace(tokens=torch.cat([self.tokens, zeros], 1), layout=layout)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)


def collate(
    dataset: Rows,
    items: Sequence[np.ndarray],
    *,
    share: bool = True,
    pad_to: int | None = None,
    reference: Tensor | None = None,
) -> Batch:
    """The micro-batch of `items`, each an array of row indices.

    `share`: whether rows share their common prefixes; dropout rules it out, as it differs between rows. `pad_to`: pads
    the line to this many positions for each item, so that all lines have the same width. `reference` [rows of the
    dataset]: given for pairs. Without items, the batch is one untrained token, so that a rank that has no rows left
    still takes part in the step.
    """
    indices = [int(row) for item in items for row in item]
    line = _Line()
    line.add([_document(dataset, row, number) for number, row in enumerate(indices)], share=share)
    batch = line.batch(sum(len(dataset[row][0]) for row in indices)).padded(max(len(items), 1) * (pad_to or 1))
    if reference is None:
        return batch
    longest = max((count for _, count in line.owners), default=0)
    return batch._replace(
        n_trained=len(items),
        reference=reference[torch.tensor(indices, dtype=torch.int64)],
        places=torch.from_numpy(_places(line.owners, longest)),
        longest=longest,
    )


class _Document(NamedTuple):
    """A row, cut after its last trained position: `tokens` [n] and the `labels` [n] that they predict, `IGNORED` where
    that isn't trained. None of the first `free` positions is trained. `number`: index of the row in the batch."""

    tokens: np.ndarray
    labels: np.ndarray
    free: int
    number: int


def _document(dataset: Rows, row: int, number: int) -> _Document:
    tokens, trained = dataset[row]
    predicting = np.flatnonzero(trained[1:])
    if not len(predicting):
        return _Document(tokens[:0], tokens[:0], 0, number)
    end = int(predicting[-1]) + 1
    labels = np.where(trained[1 : end + 1], tokens[1 : end + 1], IGNORED)
    return _Document(tokens[:end], labels, int(predicting[0]), number)


_NOTHING = _Document(np.zeros(1, dtype=np.int64), np.full(1, IGNORED), 0, 0)


class _Line:
    """A line that is being built: segments, one after the other."""

    def __init__(self) -> None:
        self.width = 0
        self.segments: list[Segment] = []
        self.owners: list[tuple[int, int]] = []  # of each segment: one of its rows, number of trained positions
        self._tokens: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._until: list[tuple[int, int]] = []  # of each segment: its width, where its subtree ends

    def add(self, documents: Sequence[_Document], *, share: bool) -> None:
        self._grow([document for document in documents if len(document.tokens)] or [_NOTHING], 0, (), share)

    def _grow(
        self, documents: Sequence[_Document], depth: int, before: tuple[tuple[int, int], ...], share: bool
    ) -> None:
        """Adds `documents`, which share their first `depth` tokens: those are in the line, in the segments `before`.

        Documents whose next `LEAST_SHARED` tokens are the same get one segment for all that they go on to share; the
        rest of each follows in a recursive call.
        """
        alike: dict[bytes | int, list[_Document]] = {}
        for document in documents:
            begin = document.tokens[depth : depth + LEAST_SHARED]
            may = share and document.free >= depth + LEAST_SHARED
            alike.setdefault(begin.tobytes() if may else document.number, []).append(document)
        for group in alike.values():
            first = group[0]
            if len(group) == 1:
                self._put(first, depth, len(first.tokens), before)
                continue
            end = depth + _common([document.tokens[depth : document.free] for document in group])
            number = len(self._until)
            start = self._put(first, depth, end, before)
            self._grow(group, end, (*before, (start, start + end - depth)), share)
            self._until[number] = (end - depth, self.width)

    def _put(self, document: _Document, start: int, end: int, before: tuple[tuple[int, int], ...]) -> int:
        """Adds positions [start, end) of `document` as a segment. Returns its first position in the line."""
        at = self.width
        self.width += end - start
        self.segments.append(Segment(at, self.width, before))
        self._tokens.append(document.tokens[start:end])
        self._labels.append(labels := document.labels[start:end])
        self._positions.append(np.arange(start, end))
        self._until.append((end - start, self.width))
        self.owners.append((document.number, int(np.count_nonzero(labels != IGNORED))))
        return at

    def batch(self, n_tokens: int) -> Batch:
        tokens, labels, positions = (
            torch.from_numpy(np.concatenate(parts).astype(np.int64))
            for parts in (self._tokens, self._labels, self._positions)
        )
        widths, ends = np.array(self._until).T
        until = torch.from_numpy(np.repeat(ends, widths))
        trained = (labels != IGNORED).nonzero()[:, 0]
        layout = Layout(tuple(self.segments), positions[None], until[None])
        return Batch(tokens[None], labels[trained], trained, trained, layout, n_tokens, len(trained))


def _common(parts: Sequence[np.ndarray]) -> int:
    """The length of the longest common prefix of `parts`."""
    shortest = min(map(len, parts))
    differ = np.any([part[:shortest] != parts[0][:shortest] for part in parts[1:]], axis=0)
    return int(differ.argmax()) if differ.any() else shortest


def _places(owners: Sequence[tuple[int, int]], longest: int) -> np.ndarray:
    """The index [n] of each trained token in a flattened matrix [rows, longest]. `owners`: one row of each segment and
    its number of trained tokens. All trained tokens of a row are in its last segment, which it shares with no other."""
    places = [number * longest + np.arange(count) for number, count in owners]
    return np.concatenate([*places, np.empty(0, dtype=np.int64)]).astype(np.int64)

"""How the rows of a micro-batch become tensors: every position that matters to the loss, and each only once.

The rows lie behind one another in one line, so there is no padding. A row ends with the last position that predicts a
trained token: nothing depends on what comes after it. And what several rows begin with, a system prompt or the prompt
of a pair, stands there once, for all of them to see: a causal model makes the same of it every time. Losses and
gradients are those of the rows by themselves, up to the order of sums.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainers.planning.memory import ROUND_BF16

IGNORED = -100
"""Label of a position that is not trained."""
ROUND = 128
"""Positions; FlexAttention's blocks have as many."""
LEAST_SHARED = 8
"""Tokens that rows must have in common to share them: fewer don't pay for a segment of their own."""


class Rows(Protocol):
    """What `TokenisedDataset` offers."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...
    @property
    def lengths(self) -> np.ndarray: ...


class Segment(NamedTuple):
    """Positions [start, end) of a line. Each sees those before it in the segment, and all of the segments `before` it,
    given by their starts and ends, from the beginning of the row."""

    start: int
    end: int
    before: tuple[tuple[int, int], ...] = ()

    @property
    def seen(self) -> int:
        """Positions that its last one sees."""
        return self.end - self.start + sum(end - start for start, end in self.before)


class Layout(NamedTuple):
    """What the positions of a line see. `segments` cover the line from 0 up to padding, parents before children, in the
    order of a walk through the tree. The same for single positions, both [1, s]: `positions` counts from the beginning
    of the row, and position k is seen by the positions k <= q < `until`[k]. Padding sees itself."""

    segments: tuple[Segment, ...]
    positions: Tensor
    until: Tensor


class Batch(NamedTuple):
    """One micro-batch. `tokens` [1, s]; `trained` [n] are the positions that carry loss, `labels` [n] the tokens that
    follow them, and `wanted` [m] is `trained` filled up to a round number, to one at least. `n_tokens`: of the rows as
    they are, whatever they share.

    `n_trained` is what the loss is a mean over: trained tokens, or pairs. Of pairs, `reference` [rows] has the
    log-probability of each row's trained tokens under the reference model, chosen and rejected in turn, and `places`
    [n] says where each trained token belongs in a matrix [rows, longest] of all of them.
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
        """On `device`, without waiting for the copy, and of round widths where kernels are made for each."""
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
        """With padding up to `width` positions, if there are fewer."""
        now = self.tokens.shape[1]
        if now >= width:
            return self
        nothing = torch.zeros(1, width - now, dtype=torch.int64)
        itself = torch.arange(now + 1, width + 1)[None]
        layout = self.layout._replace(
            positions=torch.cat([self.layout.positions, nothing], 1), until=torch.cat([self.layout.until, itself], 1)
        )
        return self._replace(tokens=torch.cat([self.tokens, nothing], 1), layout=layout)


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

    `share`: rows share what they begin with; not where dropout makes something else of it in each row. `pad_to`: tokens
    that each item is to take at least, for lines of one width. `reference` [rows of the data] is given for pairs.
    Without items: a batch of one untrained token, so that a rank that has run out of rows still takes part in the step.
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
    """A row up to its last trained position: `tokens` [n], `labels` [n] that follow them. The first `free` carry no
    loss. `number` counts the rows of the batch."""

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
    """Segments, one behind the other."""

    def __init__(self) -> None:
        self.width = 0
        self.segments: list[Segment] = []
        self.owners: list[tuple[int, int]] = []  # of each segment: a row it belongs to, trained positions
        self._tokens: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._until: list[tuple[int, int]] = []  # widths of the segments, where their subtrees end

    def add(self, documents: Sequence[_Document], *, share: bool) -> None:
        self._grow([document for document in documents if len(document.tokens)] or [_NOTHING], 0, (), share)

    def _grow(
        self, documents: Sequence[_Document], depth: int, before: tuple[tuple[int, int], ...], share: bool
    ) -> None:
        """Adds `documents`, whose first `depth` tokens stand in the segments `before`."""
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
        """Adds positions [start, end) of `document`; returns where they begin in the line."""
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
    """How many tokens all of `parts` begin with."""
    shortest = min(map(len, parts))
    differ = np.any([part[:shortest] != parts[0][:shortest] for part in parts[1:]], axis=0)
    return int(differ.argmax()) if differ.any() else shortest


def _places(owners: Sequence[tuple[int, int]], longest: int) -> np.ndarray:
    """Where each trained token goes in a matrix with a line for each row, as wide as the most of one row. A row's
    trained tokens lie together, in the last of its segments: `owners` are rows and how many tokens they have."""
    places = [number * longest + np.arange(count) for number, count in owners]
    return np.concatenate([*places, np.empty(0, dtype=np.int64)]).astype(np.int64)

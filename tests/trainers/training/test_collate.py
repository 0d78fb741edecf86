"""Collating rows: which positions are trained, and which prefixes rows share."""

import numpy as np
import pytest
import torch

from tests.trainers.recipe_support import ListedRows
from trainers.planning.memory import ROUND_BF16
from trainers.training.collate import LEAST_SHARED, Batch, collate

SYSTEM = list(range(100, 120))


def row_of(batch: Batch, number: int) -> list[int]:
    """The tokens of the segment `number`, after those of the segments that it attends to."""
    segment = batch.layout.segments[number]
    return [
        int(token)
        for start, end in [*segment.before, (segment.start, segment.end)]
        for token in batch.tokens[0, start:end]
    ]


def test_labels_are_the_next_tokens_and_a_row_ends_with_the_last_of_them() -> None:
    rows = ListedRows([[5, 6, 7, 8], [8, 9]], [[True, False, True, False], [False, True]])
    batch = collate(rows, [np.array([0]), np.array([1])])
    assert batch.tokens.tolist() == [[5, 6, 8]]
    assert (batch.trained.tolist(), batch.labels.tolist()) == ([1, 2], [7, 9])
    assert batch.layout.positions.tolist() == [[0, 1, 0]]
    assert batch.layout.until.tolist() == [[2, 2, 3]]
    assert (batch.n_tokens, batch.n_trained) == (6, 2)


def test_a_rank_without_rows_gets_one_untrained_token() -> None:
    rows = ListedRows([[5, 6]], [[True, True]])
    for pad_to, width in ((None, 1), (4, 4)):
        batch = collate(rows, [], pad_to=pad_to)
        assert (batch.n_tokens, batch.n_trained, batch.tokens.shape) == (0, 0, (1, width))
        assert len(batch.trained) == len(batch.labels) == 0
        assert batch.layout.segments[0][:2] == (0, 1)


def test_rows_without_a_trained_token_take_no_room() -> None:
    rows = ListedRows([[5, 6, 7], [8, 9]], [[True, False, False], [False, True]])
    batch = collate(rows, [np.array([0, 1])])
    assert (batch.tokens.tolist(), batch.n_tokens, batch.n_trained) == ([[8]], 5, 1)


def test_lines_in_bf16_are_filled_up_to_a_round_width_on_a_cpu() -> None:
    rows = ListedRows([[5, 6, 7, 8], [8, 9]], [[True, False, True, False], [False, True]])
    batch, cpu = collate(rows, [np.array([0, 1])]), torch.device("cpu")
    assert batch.to(cpu, torch.float32).tokens.tolist() == [[5, 6, 8]]
    rounded = batch.to(cpu, torch.bfloat16)
    assert rounded.tokens.tolist() == [[5, 6, 8] + [0] * (ROUND_BF16 - 3)]
    assert rounded.layout.until.shape == rounded.layout.positions.shape == (1, ROUND_BF16)
    assert (rounded.n_tokens, rounded.n_trained, rounded.trained.tolist()) == (6, 2, [1, 2])
    assert rounded.wanted.tolist() == [1, 2] + [0] * (ROUND_BF16 - 2)


def test_of_a_line_one_position_at_least_is_wanted() -> None:
    nothing = collate(ListedRows([[5, 6]], [[True, False]]), [np.array([0])])
    for dtype, wanted in ((torch.float32, 1), (torch.bfloat16, ROUND_BF16)):
        batch = nothing.to(torch.device("cpu"), dtype)
        assert (batch.trained.tolist(), batch.wanted.tolist()) == ([], [0] * wanted)


def test_items_are_padded_to_their_width_with_positions_that_see_only_themselves() -> None:
    rows = ListedRows([[5, 6, 7], [8, 9]], [[True] * 3, [True] * 2])
    batch = collate(rows, [np.array([0]), np.array([1])], pad_to=3)
    assert batch.tokens.tolist() == [[5, 6, 8, 0, 0, 0]]
    assert batch.layout.until.tolist() == [[2, 2, 3, 4, 5, 6]]
    assert len(batch.layout.segments) == 2


def test_what_rows_begin_with_stands_there_once() -> None:
    found = [[*SYSTEM, 1, 2, 3], [*SYSTEM, 4, 5], [7, *SYSTEM, 1], [*SYSTEM, 1, 9, 9, 9]]
    rows = ListedRows(found, [[False] * len(SYSTEM) + [True] * (len(row) - len(SYSTEM)) for row in found])
    batch = collate(rows, [np.array([row]) for row in range(4)])
    # The last position of the prompt predicts each row's first trained token: it belongs to the row.
    assert batch.layout.segments[0] == (0, len(SYSTEM) - 1, ())
    assert [row_of(batch, number) for number in (1, 2, 3, 4)] == [found[i][:-1] for i in (0, 1, 3, 2)]
    assert sorted(batch.labels.tolist()) == sorted([1, 2, 3, 4, 5, 1, 9, 9, 9, SYSTEM[-1], 1])
    assert batch.n_tokens == sum(map(len, found))
    assert batch.layout.positions[0, batch.layout.segments[2].start] == len(SYSTEM) - 1


def test_rows_share_in_as_many_steps_as_they_part_ways() -> None:
    deeper = [*SYSTEM, *range(200, 230)]
    found = [[*SYSTEM, 1, 2], [*deeper, 3, 4], [*deeper, 5, 6], [*SYSTEM, 7, 8]]
    rows = ListedRows(found, [[False] * (len(row) - 1) + [True] for row in found])
    batch = collate(rows, [np.arange(4)])
    assert [s.end - s.start for s in batch.layout.segments] == [20, 1, 30, 1, 1, 1]
    assert batch.tokens.numel() == 20 + 30 + 4
    assert batch.layout.until[0, 0] == batch.tokens.numel()
    assert batch.layout.until[0, 21] == 21 + 30 + 2


def test_trained_tokens_are_never_shared() -> None:
    same = [*SYSTEM, 1, 2, 3]
    rows = ListedRows([same, same], [[False] * 10 + [True] * 13] * 2)
    batch = collate(rows, [np.arange(2)])
    assert batch.layout.segments[0] == (0, 9, ())
    assert batch.labels.tolist() == same[10:] * 2


def test_a_few_tokens_in_common_are_not_shared() -> None:
    few = SYSTEM[: LEAST_SHARED - 1]
    found = [[*few, 1, 2], [*few, 3, 4]]
    rows = ListedRows(found, [[False] * (len(row) - 1) + [True] for row in found])
    assert len(collate(rows, [np.arange(2)]).layout.segments) == 2


def test_rows_share_nothing_where_they_must_not() -> None:
    found = [[*SYSTEM, 1, 2], [*SYSTEM, 3, 4]]
    rows = ListedRows(found, [[False] * (len(row) - 1) + [True] for row in found])
    batch = collate(rows, [np.arange(2)], share=False)
    assert batch.tokens.tolist() == [found[0][:-1] + found[1][:-1]]


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_of_pairs_knows_the_row_of_each_trained_token(shared: bool) -> None:
    found = [[*SYSTEM, i % 2, i, i, i][: 24 - i % 2] for i in range(6)]
    rows = ListedRows(found, [[False] * 21 + [True] * (len(row) - 21) for row in found])
    reference = torch.arange(6.0)
    batch = collate(rows, [np.array([4, 5]), np.array([0, 1])], share=shared, reference=reference)
    assert batch.reference is not None
    assert batch.places is not None
    assert batch.reference.tolist() == [4, 5, 0, 1]
    spread = torch.full((4 * batch.longest,), -1).scatter(0, batch.places, batch.labels).view(4, batch.longest)
    assert spread.tolist() == [[4, 4, 4], [5, 5, -1], [0, 0, 0], [1, 1, -1]]
    assert (batch.n_trained, batch.n_tokens) == (2, 24 + 23 + 24 + 23)
    nothing = collate(rows, [], reference=reference)
    assert nothing.reference is not None
    assert (nothing.n_trained, nothing.n_tokens, len(nothing.reference), nothing.longest) == (0, 0, 0, 0)

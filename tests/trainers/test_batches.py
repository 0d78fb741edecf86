"""Which rows a step takes, and what tensors they become."""

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from tests.trainers.recipe_support import write_rows
from trainers.batches import IGNORED, Progress, Schedule, collate, evaluation_batches, pack
from trainers.data.dataset import TokenisedDataset


def rows(count: int) -> list[np.ndarray]:
    return list(np.arange(count).reshape(-1, 1))


def taken(schedule: Schedule, progress: Progress | None = None) -> list[list[list[int]]]:
    """Per step, per micro-batch: the rows."""
    steps = schedule.steps(progress or Progress())
    return [[[int(item[0]) for item in share] for share in step.micro_batches] for step in steps]


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [row for step in steps for share in step for row in share]


def test_every_row_is_taken_once_an_epoch_and_the_tail_makes_a_smaller_step() -> None:
    schedule = Schedule(rows(11), n_epochs=2, batch_size=2, accumulation=2)
    steps = taken(schedule)
    assert steps[:3] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10]]]
    assert flat(steps) == [*range(11), *range(11)]
    assert schedule.total_steps(Progress()) == len(steps) == 6


def test_the_order_is_new_in_each_epoch_and_fixed_by_the_seed() -> None:
    first, second = (flat(taken(Schedule(rows(50), n_epochs=2, batch_size=5, shuffle_seed=s))) for s in (1, 2))
    assert first == flat(taken(Schedule(rows(50), n_epochs=2, batch_size=5, shuffle_seed=1)))
    assert first != second
    assert first[:50] != first[50:]
    assert sorted(first[:50]) == sorted(first[50:]) == list(range(50))


def test_the_order_is_that_of_torchs_distributed_sampler() -> None:
    class Indices(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 12

    for rank in range(2):
        sampler = DistributedSampler(Indices(), num_replicas=2, rank=rank, shuffle=True, seed=7)
        ours = Schedule(rows(12), n_epochs=2, batch_size=3, shuffle_seed=7, rank=rank, world=2)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            assert flat(taken(ours, Progress(epoch=epoch)))[:6] == list(sampler)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_share_the_same_global_batches(world: int) -> None:
    ranks = [
        taken(
            Schedule(rows(27), n_epochs=1, batch_size=4 // world, accumulation=2, rank=r, world=world, shuffle_seed=3)
        )
        for r in range(world)
    ]
    together = [
        [sorted(chain.from_iterable(shares)) for shares in zip(*step, strict=True)] for step in zip(*ranks, strict=True)
    ]
    alone = taken(Schedule(rows(27), n_epochs=1, batch_size=4, accumulation=2, shuffle_seed=3))
    assert together == [[sorted(share) for share in step] for step in alone]


def test_max_steps_per_epoch_ends_every_epoch_early() -> None:
    schedule = Schedule(rows(10), n_epochs=2, batch_size=2, max_steps_per_epoch=3)
    assert flat(taken(schedule)) == [*range(6), *range(6)]
    assert schedule.total_steps(Progress()) == 6


@pytest.mark.parametrize("max_steps", [None, 3])
def test_from_any_step_the_rest_is_what_it_would_have_been(max_steps: int | None) -> None:
    schedule = Schedule(rows(11), n_epochs=3, batch_size=2, shuffle_seed=1, max_steps_per_epoch=max_steps)
    everything = list(schedule.steps(Progress()))
    for done, step in enumerate(everything, start=1):
        assert step.after.step == done
        assert schedule.total_steps(step.after) == len(everything)
        assert taken(schedule, step.after) == taken(schedule)[done:]


def test_going_on_with_fewer_workers_takes_the_rows_that_are_left() -> None:
    two = Schedule(rows(12), n_epochs=1, batch_size=2, shuffle_seed=1, world=2)
    one = Schedule(rows(12), n_epochs=1, batch_size=2, shuffle_seed=1, world=1)
    after_first = next(two.steps(Progress())).after
    assert flat(taken(one, after_first)) == flat(taken(one))[4:]


def test_labels_are_the_next_tokens_where_the_mask_says_so(tmp_path: Path) -> None:
    data = TokenisedDataset(write_rows(tmp_path, [([5, 6, 7], [False, True, True]), ([8, 9], [True, False])]))
    batch = collate(data, [np.array([0]), np.array([1])])
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels.tolist() == [[6, 7, IGNORED], [IGNORED] * 3]
    assert (batch.n_tokens, batch.n_trained, batch.documents, batch.positions) == (5, 2, None, None)


def test_a_rank_without_rows_gets_one_untrained_token(tmp_path: Path) -> None:
    data = TokenisedDataset(write_rows(tmp_path, [([5, 6], [True, True])]))
    for pad_to in (None, 4):
        batch = collate(data, [], pad_to)
        assert (batch.n_tokens, batch.n_trained) == (0, 0)
        assert batch.labels.eq(IGNORED).all()


def test_packing_is_next_fit_and_keeps_every_row() -> None:
    assert [p.tolist() for p in pack(np.array([3, 3, 4, 10, 1]), 10)] == [[0, 1, 2], [3], [4]]
    lengths = np.random.default_rng(0).integers(1, 33, 1000)
    packs = pack(lengths, 64)
    assert np.concatenate(packs).tolist() == list(range(1000))
    assert all(lengths[p].sum() <= 64 for p in packs)
    assert all(lengths[p].sum() + lengths[q[0]] > 64 for p, q in pairwise(packs))


def test_a_row_longer_than_a_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 has 11 tokens"):
        pack(np.array([3, 11]), 10)


def test_rows_of_a_pack_are_numbered_and_count_from_zero(tmp_path: Path) -> None:
    data = TokenisedDataset(write_rows(tmp_path, [([5, 6], [False, True]), ([7, 8, 9], [True, True, True])]))
    batch = collate(data, [np.array([0, 1])], pad_to=6)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert batch.labels.tolist() == [[6, IGNORED, 8, 9, IGNORED, IGNORED]]
    assert batch.positions is not None
    assert batch.documents is not None
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1, -1]]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_covers_every_row_once_with_as_many_batches_on_each_rank(world: int) -> None:
    lengths = np.array([5, 1, 4, 2, 3, 9, 7])
    ranks = [evaluation_batches(lengths, 2, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(int(item[0]) for batches in ranks for batch in batches for item in batch) == list(range(7))

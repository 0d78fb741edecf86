"""The schedule: the rows of each step, packing, grouping by length, and the batches of an evaluation."""

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from trainers.training.batches import Progress, Schedule, evaluation_batches, pack


def schedule(count: int, **options: Any) -> Schedule:
    """A schedule of `count` rows of one token: one epoch in batches of two rows, unless `options` say otherwise."""
    lengths = options.pop("lengths", np.ones(count, dtype=np.int64))
    return Schedule(lengths, options.pop("trained", lengths), **({"n_epochs": 1, "batch_size": 2} | options))


def taken(schedule: Schedule, progress: Progress | None = None) -> list[list[list[int]]]:
    """The rows by step and micro-batch."""
    steps = schedule.steps(progress or Progress())
    return [[[int(item[0]) for item in share] for share in step.micro_batches] for step in steps]


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [row for step in steps for share in step for row in share]


def test_every_row_is_taken_once_an_epoch_and_the_tail_makes_a_smaller_step() -> None:
    plan = schedule(11, n_epochs=2, batch_size=2, accumulation=2)
    steps = taken(plan)
    assert steps[:3] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10]]]
    assert flat(steps) == [*range(11), *range(11)]
    assert plan.total_steps(Progress()) == len(steps) == 6


def test_the_order_is_new_in_each_epoch_and_fixed_by_the_seed() -> None:
    first, second = (flat(taken(schedule(50, n_epochs=2, batch_size=5, shuffle_seed=s))) for s in (1, 2))
    assert first == flat(taken(schedule(50, n_epochs=2, batch_size=5, shuffle_seed=1)))
    assert first != second
    assert first[:50] != first[50:]
    assert sorted(first[:50]) == sorted(first[50:]) == list(range(50))


def test_the_order_is_that_of_torchs_distributed_sampler() -> None:
    class Indices(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 12

    for rank in range(2):
        sampler = DistributedSampler[int](Indices(), num_replicas=2, rank=rank, shuffle=True, seed=7)
        ours = schedule(12, n_epochs=2, batch_size=3, shuffle_seed=7, rank=rank, world=2)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            assert flat(taken(ours, Progress(epoch=epoch)))[:6] == list(sampler)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_share_the_same_global_batches(world: int) -> None:
    ranks = [
        taken(schedule(27, n_epochs=1, batch_size=4 // world, accumulation=2, rank=r, world=world, shuffle_seed=3))
        for r in range(world)
    ]
    together = [
        [sorted(chain.from_iterable(shares)) for shares in zip(*step, strict=True)] for step in zip(*ranks, strict=True)
    ]
    alone = taken(schedule(27, n_epochs=1, batch_size=4, accumulation=2, shuffle_seed=3))
    assert together == [[sorted(share) for share in step] for step in alone]


def test_max_steps_per_epoch_ends_every_epoch_early() -> None:
    plan = schedule(10, n_epochs=2, batch_size=2, max_steps_per_epoch=3)
    assert flat(taken(plan)) == [*range(6), *range(6)]
    assert plan.total_steps(Progress()) == 6


@pytest.mark.parametrize("max_steps", [None, 3])
def test_from_any_step_the_rest_is_what_it_would_have_been(max_steps: int | None) -> None:
    plan = schedule(11, n_epochs=3, batch_size=2, shuffle_seed=1, max_steps_per_epoch=max_steps)
    everything = list(plan.steps(Progress()))
    for done, step in enumerate(everything, start=1):
        assert step.after.step == done
        assert plan.total_steps(step.after) == len(everything)
        assert taken(plan, step.after) == taken(plan)[done:]


def test_going_on_with_fewer_workers_takes_the_rows_that_are_left() -> None:
    two = schedule(12, n_epochs=1, batch_size=2, shuffle_seed=1, world=2)
    one = schedule(12, n_epochs=1, batch_size=2, shuffle_seed=1, world=1)
    after_first = next(two.steps(Progress())).after
    assert flat(taken(one, after_first)) == flat(taken(one))[4:]


LENGTHS = np.random.default_rng(0).integers(1, 100, 1000)


def grouped(**options: Any) -> Schedule:
    return schedule(len(LENGTHS), lengths=LENGTHS, shuffle_seed=3, group_by_length=True, **({"n_epochs": 2} | options))


def padding(steps: list[list[list[int]]]) -> float:
    """The part of the batches that is padding."""
    shares = [LENGTHS[share] for step in steps for share in step if share]
    full: float = sum(len(lengths) * lengths.max() for lengths in shares)
    return 1 - sum(int(lengths.sum()) for lengths in shares) / full


def test_grouping_by_length_saves_most_of_the_padding() -> None:
    options = {"batch_size": 4, "n_epochs": 1}
    alike, any_length = (
        taken(grouped(**options)),
        taken(schedule(1000, lengths=LENGTHS, shuffle_seed=3, **options)),
    )
    assert padding(any_length) > 0.3
    assert padding(alike) < 0.03


@pytest.mark.parametrize("batch_size", [3, 4, 1000, 1500])
def test_grouped_epochs_take_every_row_once_in_a_new_order(batch_size: int) -> None:
    steps = flat(taken(grouped(batch_size=batch_size)))
    assert sorted(steps[:1000]) == sorted(steps[1000:]) == list(range(1000))
    assert steps[:1000] != steps[1000:]
    assert steps == flat(taken(grouped(batch_size=batch_size)))


def test_neither_long_steps_nor_long_rows_come_first() -> None:
    """The length of the rows depends neither on a step's place in the epoch, nor on being in the last, smaller step."""
    steps = taken(grouped(batch_size=3, n_epochs=20))
    per_epoch = len(steps) // 20
    means = np.array([LENGTHS[flat([step])].mean() for step in steps]).reshape(20, per_epoch)
    assert abs(np.corrcoef(means.mean(axis=0), np.arange(per_epoch))[0, 1]) < 0.2
    assert abs(means[:, -1].mean() - LENGTHS.mean()) < 20


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_grouped_steps_depend_on_their_size_only_and_ranks_have_rows_of_like_length(
    world: int, accumulation: int
) -> None:
    size = 16 // world // accumulation
    ranks = [
        taken(grouped(n_epochs=1, batch_size=size, accumulation=accumulation, rank=rank, world=world))
        for rank in range(world)
    ]
    together = [sorted(flat(list(steps))) for steps in zip(*ranks, strict=True)]
    assert together == [sorted(flat([step])) for step in taken(grouped(n_epochs=1, batch_size=16))]
    means = np.array([[[LENGTHS[share].mean() for share in step] for step in steps[:-1]] for steps in ranks])
    assert np.ptp(means, axis=0).max() < 10


@pytest.mark.parametrize("max_steps", [None, 30])
def test_a_grouped_run_goes_on_from_any_step(max_steps: int | None) -> None:
    plan = grouped(batch_size=20, max_steps_per_epoch=max_steps)
    everything = list(plan.steps(Progress()))
    assert plan.total_steps(Progress()) == len(everything)
    for done, step in enumerate(everything, start=1):
        assert taken(plan, step.after) == taken(plan)[done:]
        assert plan.total_steps(step.after) == len(everything)


def test_a_grouped_epoch_that_goes_on_with_other_workers_takes_the_rows_that_are_left() -> None:
    two, one = grouped(batch_size=8, world=2), grouped(batch_size=8)
    done = [next(two.steps(Progress()))]
    done.append(next(two.steps(done[-1].after)))
    left = flat(taken(one, done[-1].after))[: 1000 - 32]
    ranks = [grouped(batch_size=8, world=2, rank=rank) for rank in range(2)]
    first = [row for rank in ranks for row in flat(taken(rank)[:2])]
    assert sorted([*first, *left]) == list(range(1000))


def test_an_epoch_begun_before_there_was_grouping_keeps_its_order() -> None:
    begun = Progress(step=2, epoch_steps=2, epoch_items=8)
    rest = flat(taken(grouped(batch_size=4, n_epochs=1), begun))
    assert rest == flat(taken(schedule(1000, batch_size=4, shuffle_seed=3)))[8:]


@pytest.mark.parametrize("options", [{}, {"group_by_length": True}, {"pack_to": 120}])
def test_every_rank_knows_the_trained_tokens_of_the_whole_step(options: dict[str, Any]) -> None:
    trained = LENGTHS // 2
    ranks = [
        list(
            schedule(
                1000, lengths=LENGTHS, trained=trained, shuffle_seed=1, accumulation=2, rank=r, world=3, **options
            ).steps(Progress())
        )
        for r in range(3)
    ]
    for shares in zip(*ranks, strict=True):
        rows = np.concatenate([item for share in shares for batch in share.micro_batches for item in batch])
        assert {share.trained for share in shares} == {trained[rows].sum()}
    assert sum(step.trained for step in ranks[0]) == trained.sum()


def test_packs_are_of_shuffled_rows_and_hold_every_row_once() -> None:
    def packs(**options: Any) -> list[list[int]]:
        plan = schedule(1000, lengths=LENGTHS, batch_size=1, pack_to=300, **options)
        return [item.tolist() for step in plan.steps(Progress()) for batch in step.micro_batches for item in batch]

    in_order, shuffled = packs(), packs(shuffle_seed=1)
    assert [row for rows in in_order for row in rows] == list(range(1000))
    assert sorted(row for rows in shuffled for row in rows) == list(range(1000))
    assert all(LENGTHS[rows].sum() <= 300 for rows in shuffled)
    neighbours = sum(abs(a - b) == 1 for rows in shuffled for a, b in pairwise(rows))
    assert neighbours < 20
    assert shuffled == packs(shuffle_seed=1) != packs(shuffle_seed=2)


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


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_covers_every_row_once_with_as_many_batches_on_each_rank(world: int) -> None:
    lengths = np.array([5, 1, 4, 2, 3, 9, 7])
    ranks = [evaluation_batches(lengths, 2, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(int(item[0]) for batches in ranks for batch in batches for item in batch) == list(range(7))


def test_a_pair_is_an_item_as_long_as_its_longer_row_and_never_torn() -> None:
    lengths = np.random.default_rng(0).integers(2, 99, 2 * 130)
    options: dict[str, Any] = {"n_epochs": 2, "batch_size": 2, "shuffle_seed": 1, "group_by_length": True}
    plan = Schedule(lengths, lengths, pairs=True, **options)
    steps = list(plan.steps(Progress()))
    items = [item.tolist() for step in steps for batch in step.micro_batches for item in batch]
    assert sorted(items[:130]) == sorted(items[130:]) == [[2 * pair, 2 * pair + 1] for pair in range(130)]
    assert {step.trained for step in steps} == {2}
    longer = lengths.reshape(-1, 2).max(axis=1)
    alone = Schedule(longer, longer, **options)
    same = [int(item[0]) for step in alone.steps(Progress()) for batch in step.micro_batches for item in batch]
    assert [first // 2 for first, _ in items] == same


def test_an_evaluation_covers_every_pair_once() -> None:
    batches = evaluation_batches(np.array([5, 1, 4, 2, 9, 9]), 2, 0, 1, pairs=True)
    assert [[item.tolist() for item in batch] for batch in batches] == [[[2, 3], [0, 1]], [[4, 5]]]

"""The schedule of a plan, and its load: the size of the heaviest micro-batch that any worker will have."""

import itertools
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainers.models.architecture import Architecture
from trainers.planning.memory import Load
from trainers.planning.plan import Plan
from trainers.training.batches import Progress, Schedule
from trainers.training.collate import Rows, collate

LOOKED_AT = 20_000
"""Steps whose micro-batches are compared if rows are shuffled: later ones are no heavier then. If not, all steps of an
epoch are compared."""
RANKS = 8
"""At most this many workers' micro-batches are compared."""
COLLATED = 8
"""This many of the heaviest micro-batches, by the tokens of their rows, are collated: prefixes that rows share make a
line shorter, and only collating shows how much."""


class PreparedRows(Rows, Protocol):
    """The part of `TokenisedDataset` that is used here. `trained` [rows]: the number of trained tokens of each row."""

    @property
    def trained(self) -> NDArray[np.int64]: ...


def load_of(plan: Plan, arch: Architecture, data: PreparedRows) -> Load:
    """The load of a worker of `plan` over `data`: the maximum over its heaviest micro-batches."""
    schedules = [build_schedule(plan, data, rank, plan.workers) for rank in range(min(plan.workers, RANKS))]
    heaviest: list[tuple[int, list[NDArray[np.int64]]]] = []
    looked_at = LOOKED_AT // len(schedules) if plan.shuffle else schedules[0].total_steps(Progress()) // plan.n_epochs
    for schedule in schedules:
        for items in itertools.islice(schedule.steps(Progress()), looked_at):
            for share in items.micro_batches:
                tokens = int(sum(data.lengths[item].sum() for item in share))
                if len(heaviest) < COLLATED or tokens > heaviest[-1][0]:
                    heaviest = sorted([*heaviest, (tokens, share)], key=lambda one: -one[0])[:COLLATED]
    lines = [collate(data, share, share=not drops(plan, arch)) for _, share in heaviest]
    return Load(
        max(line.tokens.shape[1] for line in lines),
        max(len(line.trained) for line in lines),
        max(segment.seen for line in lines for segment in line.layout.segments),
    )


def build_schedule(plan: Plan, data: PreparedRows, rank: int, world: int) -> Schedule:
    """The schedule of `plan` over `data`, for one of its workers."""
    return Schedule(
        data.lengths,
        data.trained,
        n_epochs=plan.n_epochs,
        batch_size=plan.batch_size,
        accumulation=plan.gradient_accumulation_steps,
        max_steps_per_epoch=plan.max_steps_per_epoch,
        shuffle_seed=plan.seed if plan.shuffle else None,
        pack_to=pack_size(plan),
        group_by_length=plan.group_by_length and plan.shuffle and not plan.packed,
        pairs=plan.pairs,
        rank=rank,
        world=world,
    )


def pack_size(plan: Plan) -> int | None:
    """Tokens in a pack; None if the plan doesn't pack rows."""
    return plan.max_seq_len if plan.packed else None


def drops(plan: Plan, arch: Architecture) -> bool:
    """Whether the model has dropout in training. It differs between rows, so they can't share a prefix then."""
    return arch.attention_dropout > 0 or (plan.lora is not None and plan.lora.dropout > 0)

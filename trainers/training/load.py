"""How much a run takes at a time: its steps, and the heaviest micro-batch that any worker will meet."""

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
"""Steps whose micro-batches are compared where rows are shuffled: the later ones are no heavier. In the order of the
file they may be: then it is all steps of an epoch."""
RANKS = 8
"""Workers whose share of these is looked at."""
COLLATED = 8
"""The heaviest ones, by the tokens of their rows; what rows share shows only in the line that is made of them."""


class PreparedRows(Rows, Protocol):
    """What `TokenisedDataset` offers."""

    @property
    def trained(self) -> NDArray[np.int64]: ...


def load_of(plan: Plan, arch: Architecture, data: PreparedRows) -> Load:
    """Of a worker of `plan` over `data`."""
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
    """The steps of `plan` over `data`, as one of its workers takes part in them."""
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
    """Tokens in a pack; None where rows aren't packed."""
    return plan.max_seq_len if plan.packed else None


def drops(plan: Plan, arch: Architecture) -> bool:
    """Whether dropout is at work: then a position comes out differently in each row, and rows can't share it."""
    return arch.attention_dropout > 0 or (plan.lora is not None and plan.lora.dropout > 0)

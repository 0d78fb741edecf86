"""Optimizer and learning rate of a plan. The components were checked against the allow-list when the plan was made."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from trainers.plan import Plan

WARMUP_SHARE = 0.03

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.AdamW": torch.optim.AdamW,
    "torch.optim.Adam": torch.optim.Adam,
    "torch.optim.SGD": torch.optim.SGD,
}


def build_optimizer(plan: Plan, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return _OPTIMIZERS[plan.optimizer.component](list(parameters), lr=plan.lr, **plan.optimizer.kwargs)


def warmup_steps(plan: Plan, total_steps: int) -> int:
    """Steps over which the learning rate rises from 0: as asked for, else 3 % of the run rounded down."""
    if plan.lr_scheduler is None:
        return 0
    return int(plan.lr_scheduler.kwargs.get("num_warmup_steps", int(WARMUP_SHARE * total_steps)))


def build_scheduler(
    plan: Plan, optimizer: torch.optim.Optimizer, *, total_steps: int, steps_done: int
) -> LambdaLR | None:
    """A cosine schedule that goes on after `steps_done` steps; None where the learning rate is constant.

    The rate of a step depends on the plan and the step's number only, so nothing of the schedule is saved.
    """
    if plan.lr_scheduler is None:
        return None
    for group in optimizer.param_groups:
        group["initial_lr"] = plan.lr
    scheduler: LambdaLR = get_cosine_schedule_with_warmup(
        optimizer,
        num_warmup_steps=warmup_steps(plan, total_steps),
        num_training_steps=total_steps,
        num_cycles=plan.lr_scheduler.kwargs.get("num_cycles", 0.5),
        last_epoch=steps_done - 1,
    )
    return scheduler

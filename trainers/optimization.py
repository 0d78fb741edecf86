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
    """Adam and AdamW update in one fused pass over memory unless the plan says otherwise."""
    kwargs = dict(plan.optimizer.kwargs)
    if "Adam" in plan.optimizer.component and not kwargs.keys() & {"fused", "foreach"}:
        kwargs["fused"] = True
    return _OPTIMIZERS[plan.optimizer.component](list(parameters), lr=plan.lr, **kwargs)


def warmup_steps(plan: Plan, total_steps: int) -> int:
    """Steps over which the learning rate rises from 0: as asked for, else 3 % of the run rounded down."""
    if plan.lr_scheduler is None:
        return 0
    return int(plan.lr_scheduler.kwargs.get("num_warmup_steps", int(WARMUP_SHARE * total_steps)))


def build_scheduler(
    plan: Plan, optimizer: torch.optim.Optimizer, *, total_steps: int, steps_done: int
) -> LambdaLR | None:
    """The plan's schedule, going on after `steps_done` steps; None where the learning rate is constant from the start.

    The rate of a step depends on the plan and the step's number only, so nothing of the schedule is saved.
    """
    if plan.lr_scheduler is None:
        return None
    for group in optimizer.param_groups:
        group["initial_lr"] = plan.lr
    return _SCHEDULES[plan.lr_scheduler.component](
        optimizer,
        num_warmup_steps=warmup_steps(plan, total_steps),
        num_training_steps=total_steps,
        last_epoch=steps_done - 1,
        **{name: value for name, value in plan.lr_scheduler.kwargs.items() if name != "num_warmup_steps"},
    )


def get_constant_schedule_with_warmup(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Up from 0 in a straight line over the warm-up, then the peak rate; as transformers' schedule of that name."""
    return LambdaLR(optimizer, lambda step: _rising(step, num_warmup_steps), last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Up as the constant schedule, then down in a straight line to 0 at the end; as transformers' of that name."""

    def share(step: int) -> float:
        falling = (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps)
        return _rising(step, num_warmup_steps) if step < num_warmup_steps else max(0.0, falling)

    return LambdaLR(optimizer, share, last_epoch)


def _rising(step: int, warmup: int) -> float:
    return min(1.0, step / warmup) if warmup else 1.0


_SCHEDULES: dict[str, Callable[..., LambdaLR]] = {
    "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup": get_cosine_schedule_with_warmup,
    "trainers.optimization.get_linear_schedule_with_warmup": get_linear_schedule_with_warmup,
    "trainers.optimization.get_constant_schedule_with_warmup": get_constant_schedule_with_warmup,
}

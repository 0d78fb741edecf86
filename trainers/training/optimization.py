"""The optimizer and the learning-rate schedule of a plan. Their components were checked against the allow-list when the
plan was made.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from trainers.errors import UserError
from trainers.planning.components import missing_package, shardable
from trainers.planning.memory import TOGETHER
from trainers.planning.plan import EXTRAS, Plan
from trainers.training.distributed import like
from trainers.training.mixed_adam import MixedAdam, MixedAdamW

WARMUP_SHARE = 0.03
"""The share of a run's steps that are warm-up, unless the plan says otherwise."""


def build_optimizer(
    plan: Plan, parameters: Iterable[nn.Parameter], copied: Iterable[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The plan's optimizer for `parameters`. torch's Adam and AdamW are fused unless the plan says otherwise.

    `copied`: the model's parameters, of which `parameters` are fp32 copies, in the same order. The optimizer then takes
    the gradients of the former, updates the copies, and writes them to the model's parameters.

    Raises UserError if the optimizer's package isn't installed on this node, or if `parameters` are sharded and the
    optimizer's state can't be.
    """
    name, kwargs, parameters = plan.optimizer.component, dict(plan.optimizer.kwargs), list(parameters)
    if package := missing_package(name):
        raise UserError(
            "component_not_installed",
            f"{name} needs the package {package}, which isn't installed on this node",
            param=f"{EXTRAS}.optimizer",
            suggestion="install it on every node, or use torch.optim.AdamW",
        )
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    if sharded and not shardable(name):
        raise UserError(
            "optimizer_not_sharded",
            f"the model is too large for each worker to hold all of it, and the state of {name} can't be sharded",
            param=f"{EXTRAS}.optimizer",
            suggestion="use torch.optim.AdamW, or quantize_base",
        )
    if sharded and name == "torch.optim.SGD":
        kwargs.pop("fused", None)  # torch can't compute it for sharded parameters
    module, _, kind = name.rpartition(".")
    if plan.fused_adam:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("fused", "foreach")}
        if copied is not None:
            mixed = MixedAdamW if kind == "AdamW" else MixedAdam
            return mixed(dict(zip(parameters, copied, strict=True)), {"lr": plan.lr, **kwargs})
        kwargs["fused"] = True
    optimizer: torch.optim.Optimizer = getattr(importlib.import_module(module), kind)(parameters, lr=plan.lr, **kwargs)
    if copied is not None:
        _train_copies(optimizer, dict(zip(parameters, copied, strict=True)))
    return optimizer


def _train_copies(optimizer: torch.optim.Optimizer, copied: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Makes each step take the gradients of the model's parameters and write the updated copies to them. `copied` maps
    each copy to its parameter."""
    (group,) = optimizer.param_groups

    def take_gradients(*_: object) -> None:
        for copy in group["params"]:
            weight = copied[copy]
            if weight.grad is not None:
                copy.grad, weight.grad = weight.grad.to(copy.dtype), None

    @torch.no_grad()
    def write_values(*_: object) -> None:
        for copy in group["params"]:
            if copy.grad is not None:
                copied[copy].copy_(copy)

    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(write_values)


@contextmanager
def updating_in_backward(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this context, the backward pass updates parameters as soon as it has the gradients of at least `TOGETHER`
    numbers, and frees these gradients. So the gradients of the whole model are never in memory together. The results
    are the same bits as those of a step after the backward pass.

    `parameters` are the model's, in the order of the optimizer's: the same ones, or those that it has copies of.
    """
    (group,) = optimizer.param_groups
    updated = group["params"]
    waiting: list[tuple[Tensor, nn.Parameter]] = []

    def update() -> None:
        group["params"] = [one for _, one in waiting]
        optimizer.step()
        for parameter, one in waiting:
            parameter.grad = one.grad = None
        waiting.clear()

    def has_gradient(parameter: Tensor, one: nn.Parameter) -> None:
        waiting.append((parameter, one))
        if sum(parameter.numel() for parameter, _ in waiting) >= TOGETHER:
            update()

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(has_gradient, one=one))  # type: ignore[no-untyped-call]
        for parameter, one in zip(parameters, updated, strict=True)
    ]
    try:
        yield
        if waiting:
            update()
    finally:
        group["params"] = updated
        for handle in handles:
            handle.remove()


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state of `parameter` that has to be restored to resume exactly; empty before the first step.

    A tensor that torchao holds compressed comes in parts, `exp_avg.codes` and `exp_avg.scale`. The lookup tables of the
    codes (torchao's and bitsandbytes' qmap) never change and are left out.
    """
    found: dict[str, Tensor] = {}
    for name, value in optimizer.state.get(parameter, {}).items():
        if hasattr(value, "codes"):
            found |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        elif isinstance(value, int):  # bitsandbytes counts its steps in an int
            found[name] = torch.tensor(value)
        elif isinstance(value, Tensor) and not name.startswith("qmap"):
            found[name] = value
    return found


def restore_optimizer_state(optimizer: Any, parameter: nn.Parameter, saved: Mapping[str, Tensor]) -> None:  # noqa: ANN401
    """Restores the state of `parameter` that `optimizer_state` returned. Every rank has to call it."""
    state = optimizer.state[parameter]
    if hasattr(optimizer, "init_state"):  # bitsandbytes makes its tables and its memory, which may be paged
        group = optimizer.param_groups[0]
        optimizer.init_state(group, parameter, 0, [p is parameter for p in group["params"]].index(True))
        for name, value in saved.items():
            if isinstance(state[name], Tensor):
                state[name].copy_(value)
            else:
                state[name] = value.item()
        return
    for name, value in saved.items():
        whole, _, part = name.partition(".")
        if part:
            if whole not in state:
                state[whole] = optimizer._new_buffer(parameter, signed=whole == "exp_avg")
            getattr(state[whole], part).copy_(value)
        elif value.shape == parameter.shape:
            state[name] = like(value.clone(), parameter)
        else:
            state[name] = value.to(parameter.device) if optimizer.param_groups[0].get("fused") else value


def warmup_steps(plan: Plan, total_steps: int) -> int:
    """The number of steps over which the learning rate rises from 0: the plan's, else 3 % of the run, rounded down."""
    if plan.lr_scheduler is None:
        return 0
    return int(plan.lr_scheduler.kwargs.get("num_warmup_steps", int(WARMUP_SHARE * total_steps)))


def only_warm_up(plan: Plan, total_steps: int) -> str | None:
    """A warning if the run ends before the learning rate has risen to `lr`; otherwise None."""
    steps = warmup_steps(plan, total_steps)
    if steps < max(total_steps, 1):
        return None
    return (
        f"lr_scheduler.num_warmup_steps is {steps:,} and the run has {total_steps:,} steps: the learning rate never "
        "reaches lr; set fewer, or leave it out for 3 % of the steps"
    )


def build_scheduler(
    plan: Plan, optimizer: torch.optim.Optimizer, *, total_steps: int, steps_done: int
) -> LambdaLR | None:
    """The plan's schedule after `steps_done` steps; None if the plan has none: then the learning rate is constant.

    The rate of a step depends only on the plan, the number of steps and the step, so checkpoints hold no schedule.
    """
    if plan.lr_scheduler is None:
        return None
    for group in optimizer.param_groups:
        group["initial_lr"] = plan.lr
    return SCHEDULES[plan.lr_scheduler.component](
        optimizer,
        num_warmup_steps=warmup_steps(plan, total_steps),
        num_training_steps=total_steps,
        last_epoch=steps_done - 1,
        **{name: value for name, value in plan.lr_scheduler.kwargs.items() if name != "num_warmup_steps"},
    )


def get_constant_schedule_with_warmup(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Rises linearly from 0 over the warm-up, then stays at the peak rate; as in transformers."""
    return LambdaLR(optimizer, lambda step: _rising(step, num_warmup_steps), last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Rises linearly from 0 over the warm-up, then falls linearly to 0 at the end; as in transformers."""

    def share(step: int) -> float:
        falling = (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps)
        return _rising(step, num_warmup_steps) if step < num_warmup_steps else max(0.0, falling)

    return LambdaLR(optimizer, share, last_epoch)


def _rising(step: int, warmup: int) -> float:
    """The share of the peak rate during the warm-up; 1 after it."""
    return min(1.0, step / warmup) if warmup else 1.0


SCHEDULES: dict[str, Callable[..., LambdaLR]] = {
    "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup": get_cosine_schedule_with_warmup,
    "trainers.optimization.get_linear_schedule_with_warmup": get_linear_schedule_with_warmup,
    "trainers.optimization.get_constant_schedule_with_warmup": get_constant_schedule_with_warmup,
}

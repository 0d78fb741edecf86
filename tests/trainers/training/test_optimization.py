"""Learning-rate schedules, and the moments at which weights are updated."""

from typing import Any

import pytest
import torch

from tests.trainers.recipe_support import make_plan_for
from trainers.planning.plan import ComponentSpec, Plan
from trainers.training import optimization
from trainers.training.mixed_adam import MixedAdam
from trainers.training.optimization import build_optimizer, build_scheduler, updating_in_backward

TOTAL = 8


def rates(plan: Plan, steps_done: int = 0) -> list[float]:
    """The learning rates of the steps after `steps_done`."""
    optimizer = build_optimizer(plan, [torch.nn.Parameter(torch.zeros(1))])
    scheduler = build_scheduler(plan, optimizer, total_steps=TOTAL, steps_done=steps_done)
    found = []
    for _ in range(TOTAL - steps_done):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return found


def plan_with(component: str, warmup: int) -> Plan:
    name = f"trainers.optimization.get_{component}_schedule_with_warmup"
    return make_plan_for(lr=1.0, lr_scheduler=ComponentSpec(component=name, kwargs={"num_warmup_steps": warmup}))


def test_the_linear_schedule_rises_and_falls_in_straight_lines() -> None:
    assert rates(plan_with("linear", 2)) == pytest.approx([0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates(plan_with("linear", 0))[0] == 1


def test_the_constant_schedule_stays_where_its_warm_up_ends() -> None:
    assert rates(plan_with("constant", 2)) == pytest.approx([0, 1 / 2, 1, 1, 1, 1, 1, 1])


def test_without_a_schedule_the_rate_is_constant_from_the_first_step() -> None:
    assert rates(make_plan_for(lr=1.0, lr_scheduler=None)) == [1.0] * TOTAL


@pytest.mark.parametrize("component", ["linear", "constant"])
def test_a_resumed_schedule_goes_on_where_it_was(component: str) -> None:
    plan = plan_with(component, 3)
    assert rates(plan, steps_done=5) == rates(plan)[5:]


def test_adam_is_fused_unless_the_plan_says_otherwise() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    assert build_optimizer(make_plan_for(), parameters).defaults["fused"]
    unfused = make_plan_for(optimizer=ComponentSpec(component="torch.optim.AdamW", kwargs={"foreach": False}))
    assert not build_optimizer(unfused, parameters).defaults["fused"]


@pytest.mark.parametrize("asked_for", [{"foreach": None}, {"fused": True}, {"betas": (0.8, 0.9)}])
def test_adam_in_mixed_precision_is_fused_too(asked_for: dict[str, Any]) -> None:
    plan = make_plan_for(optimizer=ComponentSpec(component="torch.optim.Adam", kwargs=asked_for))
    copies, weights = ([torch.nn.Parameter(torch.zeros(1, dtype=dtype))] for dtype in (torch.float32, torch.bfloat16))
    assert type(build_optimizer(plan, copies, weights)) is MixedAdam


def test_within_the_backward_pass_few_gradients_are_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "TOGETHER", 20)  # of layers of 16 numbers, two
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(5)))
    optimizer = build_optimizer(make_plan_for("full"), layers.parameters())
    there = []
    optimizer.register_step_pre_hook(
        lambda *_: there.append([n for n, p in enumerate(layers.parameters()) if p.grad is not None])
    )
    before = [p.detach().clone() for p in layers.parameters()]
    with updating_in_backward(optimizer, layers.parameters()):
        layers(torch.ones(1, 4)).sum().backward()
    assert there == [[3, 4], [1, 2], [0]]
    assert [p.grad for p in layers.parameters()] == [None] * 5
    assert not any(torch.equal(p, old) for p, old in zip(layers.parameters(), before, strict=True))
    layers(torch.ones(1, 4)).sum().backward()  # outside, nothing is updated
    assert len(there) == 3

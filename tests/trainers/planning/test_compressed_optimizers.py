"""Optimizers with 8-bit and 4-bit state: they train as AdamW does, and resume exactly."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.tiny_models import make_tiny_model
from tests.trainers.recipe_support import Case, make_plan_for, random_rows, saved_weights, write_rows
from trainers.planning.components import COMPONENTS, allowed, missing_package, shardable
from trainers.planning.plan import ComponentSpec, Plan
from trainers.training.checkpoint import STATE

NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(missing_package(name) is not None, reason="its package is missing"))
    for name in allowed("optimizer")
    if not shardable(name)
]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its update for each shape, which takes long: here it runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def case(tmp_path: Path) -> Case:
    data = write_rows(tmp_path / "train", random_rows(21))
    return Case(planned("torch.optim.AdamW"), make_tiny_model(tmp_path / "tiny"), data, tmp_path / "run")


def planned(name: str) -> Plan:
    return make_plan_for("full", optimizer=ComponentSpec(component=name, kwargs={"weight_decay": 0.1}))


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_adamw_does(case: Case, tmp_path: Path, name: str) -> None:
    expected = list(case.run().losses.values())
    got = list(replace(case, plan=planned(name), output_dir=tmp_path / "other").run().losses.values())
    assert got == pytest.approx(expected, abs=0.1 if "4bit" in name else 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_with_every_argument_that_may_be_set(case: Case, name: str) -> None:
    """torchao's constructors take `amsgrad` too, and their steps fail."""
    values = {"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True}
    arguments = {argument: values[argument] for argument in COMPONENTS[name].arguments}
    optimizer = ComponentSpec(component=name, kwargs=arguments)
    assert len(replace(case, plan=make_plan_for("full", optimizer=optimizer)).run().checkpoints) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_interrupted_goes_on_to_the_bit(case: Case, tmp_path: Path, name: str) -> None:
    case.plan = planned(name)
    whole = case.run()
    first = replace(case, output_dir=tmp_path / "first", stop_at=4).run()
    path = first.checkpoints[-1].path
    second = replace(case, output_dir=tmp_path / "second", resume_from=path).run()
    assert first.losses | second.losses == whole.losses
    expected, resumed = (saved_weights(run.checkpoints[-1].path) for run in (whole, second))
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


@pytest.mark.parametrize(("name", "byte"), [("torchao.optim.AdamW8bit", 2), ("torchao.optim.AdamW4bit", 1)])
def test_the_state_is_saved_compressed(case: Case, name: str, byte: int) -> None:
    """Two moments of each weight of a layer, a scale for each block, and the step: AdamW's take 8 bytes."""
    case.plan = planned(name)
    path = case.run().checkpoints[-1].path
    layer = "layers.0.mlp.w1.weight"
    with safe_open(path / STATE / "optimizer.safetensors", framework="pt") as file:
        kept = [file.get_tensor(key) for key in file.keys() if key.endswith(layer)]  # noqa: SIM118  -- not a dict
    numbers = saved_weights(path)["model.layers.0.mlp.gate_proj.weight"].numel()
    assert byte <= sum(tensor.nbytes for tensor in kept) / numbers < byte * 1.1

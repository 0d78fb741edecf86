"""The formula for a worker's memory: what autograd keeps, tensor by tensor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.tiny_models import make_tiny_model
from tests.trainers.memory_support import FULL, LOAD, LORA, ROW, ROWS, Rows, plan_for
from trainers.methods import method_of
from trainers.models.architecture import Architecture, inspect_model_dir
from trainers.planning.memory import BUFFERS, Load, Size, memory_of, states_of
from trainers.planning.plan import Plan
from trainers.training.collate import collate
from trainers.training.distributed import Ranks
from trainers.training.optimization import build_optimizer
from trainers.training.training_model import TrainingModel, build_training_model, choose_dtype

EVERYWHERE = {**LORA, "apply_lora_to_mlp": True}


def built(folder: Path, family: str, custom: dict[str, Any], **extras: Any) -> tuple[Plan, Architecture, TrainingModel]:
    plan = plan_for(folder, custom, **extras)
    arch = inspect_model_dir(folder)
    ranks = Ranks(0, 1, torch.device("cpu"))
    model = build_training_model(plan, method_of(plan), arch, folder, None, choose_dtype(plan, ranks), ranks)
    model.train()
    return plan, arch, model


def kept_by(model: TrainingModel, wanted: int | None = None) -> int:
    """Bytes that autograd keeps for the backward pass of one line, apart from parameters and tables. `wanted`: of how
    many positions the last layer is to do all; None: of those that are trained."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    batch = collate(Rows(), [np.array([row]) for row in range(ROWS)])
    if wanted is not None:
        batch = batch._replace(wanted=torch.arange(wanted))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("family", "custom", "extras"),
    [
        ("llama", FULL, {}),
        ("llama", FULL, {"dtype": "bf16"}),
        ("llama", LORA, {}),
        ("llama", LORA, {"dtype": "bf16"}),
        ("llama", EVERYWHERE, {}),
        ("llama", EVERYWHERE, {"use_dora": True}),
        ("phi3", LORA, {}),
        ("qwen2", FULL, {}),
        ("qwen3", FULL, {}),
        ("qwen3", LORA, {}),
        ("gemma", FULL, {}),
        ("gemma2", FULL, {}),
    ],
)
def test_what_a_layer_keeps_is_what_the_formula_says(
    tmp_path: Path, family: str, custom: dict[str, Any], extras: dict[str, Any]
) -> None:
    kept = []
    for layers in (2, 4):  # of two kinds in turn, in gemma2
        folder = make_tiny_model(tmp_path / str(layers), family, num_hidden_layers=layers)
        plan, arch, model = built(folder, family, custom, **extras)
        kept.append(kept_by(model))
    positions, trained = ROWS * (ROW - 1), ROWS * ROW // 2
    load = Load(positions=positions, trained=trained, segment=ROW - 1)
    saved = Size(plan, arch, "cpu", None).saved_per_position(load)
    assert sum(saved) == pytest.approx((kept[1] - kept[0]) / 2 / positions, rel=0.03)
    left_out = (kept_by(model, wanted=positions) - kept[1]) / (positions - trained)
    by_norm = arch.hidden_size * model.computed_in.itemsize  # the last one keeps its input, part of what is made
    assert saved.behind == pytest.approx(left_out - by_norm - torch.int64.itemsize, rel=0.03)


@pytest.mark.parametrize(
    ("custom", "extras"),
    [
        (FULL, {}),
        (FULL, {"dtype": "bf16"}),
        (FULL, {"optimizer": {"_component_": "torch.optim.SGD"}}),
        (FULL, {"optimizer": {"_component_": "torch.optim.AdamW", "amsgrad": True}}),
        (LORA, {}),
        (EVERYWHERE, {"use_dora": True}),
    ],
)
def test_weights_and_optimizer_are_as_large_as_the_formula_says(
    tmp_path: Path, custom: dict[str, Any], extras: dict[str, Any]
) -> None:
    plan, arch, model = built(make_tiny_model(tmp_path / "m"), "llama", custom, **extras)
    optimizer = build_optimizer(plan, model.trainable().values())
    for parameter in model.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    size = Size(plan, arch, "cpu", None)
    assert size.weight_bytes == sum(p.numel() * p.itemsize for p in model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert size.optimizer_bytes == sum(value.numel() * value.itemsize for value in states if value.numel() > 1)


@pytest.fixture
def arch(tmp_path: Path) -> Architecture:
    return inspect_model_dir(make_tiny_model(tmp_path / "m"))


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"enable_activation_checkpointing": True}, {}),
        ({}, {"gradient_accumulation_steps": 2}),
        ({"dtype": "bf16"}, {}),
        ({"nproc_per_node": 8}, {"nproc_per_node": 2}),
    ],
)
def test_each_suggested_change_needs_less_memory(
    arch: Architecture, tmp_path: Path, less: dict[str, Any], more: dict[str, Any]
) -> None:
    plan = plan_for(tmp_path / "m", FULL)
    small, large = (memory_of(plan.model_copy(update=changes), arch, LOAD, "cpu") for changes in (less, more))
    assert small.peak_bytes < large.peak_bytes


def test_on_a_gpu_nothing_in_the_host_s_memory_is_counted(arch: Architecture, tmp_path: Path) -> None:
    full, lora = (plan_for(tmp_path / "m", custom, dtype="mixed") for custom in (FULL, LORA))
    alone = memory_of(lora, arch, LOAD, "cuda")
    assert (alone.checkpoint, alone.overhead) == (0, BUFFERS)
    sharded = full.model_copy(update={"nproc_per_node": 2})
    offloaded = sharded.model_copy(update={"fsdp_cpu_offload": True})
    here, there = (memory_of(plan, arch, LOAD, "cuda") for plan in (sharded, offloaded))
    assert Size(sharded, arch, "cuda", None).checkpoint_bytes() == 4 * arch.vocab_size * arch.hidden_size
    assert (there.optimizer, there.activations) == (0, here.activations)
    assert here.weights - there.weights == states_of(sharded, arch, "cuda") - here.optimizer
    assert states_of(offloaded, arch, "cuda") == 0

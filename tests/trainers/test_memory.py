"""The formula for a worker's memory: what autograd keeps, tensor by tensor; and jobs that fit no node are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from events.config import Config
from tests.tiny_models import make_tiny_model
from trainers.collate import collate
from trainers.distributed import Ranks
from trainers.errors import UserError
from trainers.load import Load, load_of
from trainers.memory import MARGIN, _Size, check_memory, memory_of, recomputing_if_needed, states_fit, surely_fits
from trainers.methods import method_of
from trainers.models.architecture import Architecture, inspect_model_dir
from trainers.optimization import build_optimizer
from trainers.plan import Plan, make_plan
from trainers.training_model import TrainingModel, build_training_model, choose_dtype

FULL = {"finetuning_type": "full", "enable_activation_checkpointing": False}
LORA = {"finetuning_type": "lora", "lora_rank": 8}
EVERYWHERE = {**LORA, "apply_lora_to_mlp": True}
ROW, ROWS = 64, 4


class Rows:
    """Rows of random tokens, of which the second half is trained."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.random.default_rng(index).integers(0, 500, ROW)
        return tokens, np.arange(ROW) >= ROW // 2

    @property
    def lengths(self) -> np.ndarray:
        return np.full(ROWS, ROW)

    @property
    def trained(self) -> np.ndarray:
        return np.full(ROWS, ROW // 2)


def plan_for(model: Path, custom: dict[str, Any], **extras: Any) -> Plan:
    options = {"custom_training_options": custom, "extras": {"dtype": "fp32", **extras}}
    return make_plan(Config.model_validate({"model": str(model), "data": "d", "fine_tuning_options": options}))


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
    load = Load(steps=1, items=ROWS, positions=positions, trained=trained, segment=ROW - 1)
    saved = _Size(plan, arch, "cpu", None).saved_per_position(load)
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
    size = _Size(plan, arch, "cpu", None)
    assert size.weight_bytes == sum(p.numel() * p.itemsize for p in model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert size.optimizer_bytes == sum(value.numel() * value.itemsize for value in states if value.numel() > 1)


@pytest.fixture
def arch(tmp_path: Path) -> Architecture:
    return inspect_model_dir(make_tiny_model(tmp_path / "m"))


LOAD = Load(steps=1, items=8, positions=1600, trained=800, segment=400)


def test_a_job_is_refused_only_beyond_the_margin_and_with_what_would_make_it_fit(
    arch: Architecture, tmp_path: Path
) -> None:
    arch = replace(arch, hidden_size=512, intermediate_size=1536, num_layers=30, windows=(None,) * 30)
    plan = plan_for(tmp_path / "m", FULL)
    needed = memory_of(plan, arch, LOAD, "cpu").peak_bytes
    check_memory(plan, arch, LOAD, int(needed / MARGIN) + 1)
    with pytest.raises(UserError) as caught:
        check_memory(plan, arch, LOAD, int(needed / MARGIN) - 1)
    error = caught.value.error
    assert (error.code, error.fault, error.retryable) == ("does_not_fit", "user", False)
    easier = plan.model_copy(update={"enable_activation_checkpointing": True})
    assert memory_of(easier, arch, LOAD, "cpu").peak_bytes <= needed / MARGIN
    assert "set enable_activation_checkpointing" in (error.suggestion or "")
    # To what no single change is enough for, none is proposed.
    with pytest.raises(UserError, match="take a smaller model"):
        check_memory(plan, arch, LOAD, 10 << 20)


@pytest.mark.parametrize("extras", [{}, {"batch_size": 3}, {"dataset": {"packed": True}, "max_seq_len": 64}])
def test_what_surely_fits_is_never_refused_by_the_closer_look(
    arch: Architecture, tmp_path: Path, extras: dict[str, Any]
) -> None:
    plan = plan_for(tmp_path / "m", FULL, **extras)
    rows = Rows()
    load = load_of(plan, arch, rows)
    needed = memory_of(plan, arch, load, "cpu").peak_bytes
    for there in np.linspace(needed / MARGIN / 2, 4 * needed, 50).astype(int):
        if surely_fits(plan, arch, rows.lengths, int(there)):
            check_memory(plan, arch, load, int(there))
    assert surely_fits(plan, arch, rows.lengths, 4 * needed)
    assert not surely_fits(plan, arch, rows.lengths, int(needed / MARGIN) - 1)


def test_activations_are_recomputed_where_keeping_them_could_exceed_a_worker_s_share(
    arch: Architecture, tmp_path: Path
) -> None:
    asked, rows = plan_for(tmp_path / "m", FULL | {"enable_activation_checkpointing": True}), Rows()
    keeping = asked.model_copy(update={"enable_activation_checkpointing": False})
    needed = MARGIN * memory_of(keeping, arch, load_of(keeping, arch, rows), "cpu").peak_bytes
    assert recomputing_if_needed(asked, arch, rows.lengths, int(needed) - 1) == asked
    assert recomputing_if_needed(asked, arch, rows.lengths, 2 * int(needed)) == keeping
    assert recomputing_if_needed(asked, arch, rows.lengths, None) == asked
    assert recomputing_if_needed(keeping, arch, rows.lengths, 1) == keeping


def test_a_request_is_refused_at_once_for_its_weights_and_optimizer_only(arch: Architecture, tmp_path: Path) -> None:
    full, lora = (plan_for(tmp_path / "m", custom) for custom in (FULL, LORA))
    numbers = sum(p.numel() for p in built(tmp_path / "m", "llama", FULL)[2].parameters())
    there = int(3 * 4 * numbers / MARGIN) - 100
    problem = states_fit(full, arch, there)
    assert problem is not None
    assert problem.code == "does_not_fit"
    assert states_fit(full, arch, there + 200) is None
    assert states_fit(lora, arch, there) is None


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"enable_activation_checkpointing": True}, {}),
        ({}, {"gradient_accumulation_steps": 2}),
        ({"dtype": "bf16"}, {}),
        ({"nproc_per_node": 8}, {"nproc_per_node": 2}),
    ],
)
def test_what_is_said_to_need_less_does(
    arch: Architecture, tmp_path: Path, less: dict[str, Any], more: dict[str, Any]
) -> None:
    plan = plan_for(tmp_path / "m", FULL)
    small, large = (memory_of(plan.model_copy(update=changes), arch, LOAD, "cpu") for changes in (less, more))
    assert small.peak_bytes < large.peak_bytes

"""Only jobs that fit no node are refused, with suggestions that would make them fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_models import make_tiny_model
from tests.trainers.memory_support import FULL, LOAD, LORA, ROW, Rows, plan_for
from trainers.errors import CapacityError
from trainers.models.architecture import Architecture, inspect_model_dir
from trainers.models.layout import numbers_of
from trainers.planning.fitting import MARGIN, check_memory, check_states, recomputing_if_needed, states_fit, surely_fits
from trainers.planning.memory import memory_of, states_of
from trainers.planning.plan import Plan
from trainers.training.load import load_of


@pytest.fixture
def arch(tmp_path: Path) -> Architecture:
    return inspect_model_dir(make_tiny_model(tmp_path / "m"))


def test_a_job_is_refused_only_beyond_the_margin_and_with_what_would_make_it_fit(
    arch: Architecture, tmp_path: Path
) -> None:
    arch = replace(arch, hidden_size=512, intermediate_size=1536, num_layers=30, windows=(None,) * 30)
    plan = plan_for(tmp_path / "m", FULL)
    needed = memory_of(plan, arch, LOAD, "cpu").peak_bytes
    check_memory(plan, arch, LOAD, int(needed / MARGIN) + 1)
    with pytest.raises(CapacityError) as caught:
        check_memory(plan, arch, LOAD, int(needed / MARGIN) - 1)
    error = caught.value.error
    assert (error.code, error.fault, error.retryable) == ("does_not_fit", "capacity", False)
    easier = plan.model_copy(update={"enable_activation_checkpointing": True})
    assert memory_of(easier, arch, LOAD, "cpu").peak_bytes <= needed / MARGIN
    assert "set enable_activation_checkpointing" in (error.suggestion or "")
    # To what no single change is enough for, none is proposed.
    with pytest.raises(CapacityError, match="take a smaller model"):
        check_memory(plan, arch, LOAD, 10 << 20)


@pytest.mark.parametrize("extras", [{}, {"batch_size": 3}, {"dataset": {"packed": True}, "max_seq_len": 64}])
def test_what_surely_fits_is_never_refused_by_the_exact_check(
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


def test_without_shuffling_a_long_row_at_the_end_of_the_data_is_counted(
    arch: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.training.load.LOOKED_AT", 4)
    plan = plan_for(tmp_path / "m", FULL, shuffle=False, batch_size=1, n_epochs=3)
    assert load_of(plan, arch, Rows([ROW] * 20 + [10 * ROW])).positions == 10 * ROW - 1


def test_activations_are_recomputed_if_keeping_them_could_exceed_a_worker_s_share(
    arch: Architecture, tmp_path: Path
) -> None:
    asked, rows = plan_for(tmp_path / "m", FULL | {"enable_activation_checkpointing": True}), Rows()
    keeping = asked.model_copy(update={"enable_activation_checkpointing": False})
    needed = MARGIN * memory_of(keeping, arch, load_of(keeping, arch, rows), "cpu").peak_bytes
    assert recomputing_if_needed(asked, arch, rows.lengths, int(needed) - 1) == asked
    assert recomputing_if_needed(asked, arch, rows.lengths, 2 * int(needed)) == keeping
    assert recomputing_if_needed(asked, arch, rows.lengths, None) == asked
    assert recomputing_if_needed(keeping, arch, rows.lengths, 1) == keeping


def test_on_one_gpu_a_full_fine_tuning_by_default_is_refused_though_more_gpus_would_offload_it(
    arch: Architecture, tmp_path: Path
) -> None:
    defaults = plan_for(tmp_path / "m", {"finetuning_type": "full"})
    assert defaults.fsdp_cpu_offload
    states = states_of(defaults, arch, "cuda")
    with pytest.raises(CapacityError, match="weights and optimizer alone"):
        check_states(defaults, arch, states // 2)
    check_states(defaults.model_copy(update={"nproc_per_node": 2}), arch, states // 2)


def told(plan: Plan, arch: Architecture, worker_bytes: int) -> list[str]:
    """What a GPU of that size is said to need."""
    with pytest.raises(CapacityError) as caught:
        check_states(plan, arch, worker_bytes)
    return (caught.value.error.suggestion or "").split("; or ")


def test_on_a_gpu_the_suggestion_names_the_method_and_the_workers_that_would_fit(
    arch: Architecture, tmp_path: Path
) -> None:
    arch = replace(arch, hidden_size=512, intermediate_size=1536, num_layers=30, windows=(None,) * 30)
    full, lora = (plan_for(tmp_path / "m", custom, dtype="mixed") for custom in (FULL, LORA))
    frozen, trained = (states_of(plan, arch, "cuda") for plan in (lora, full))
    # Of several numbers the least; LoRA, though it is said to be sharded from half a GPU on.
    assert told(full, arch, trained * 45 // 100) == ["train with LoRA", "set dtype to bf16", "use 4 workers"]
    assert told(lora, arch, frozen * 9 // 10) == ["set quantize_base", "use 2 workers"]
    assert told(full, arch, frozen // 2) == ["train with LoRA, quantize_base and enable_activation_checkpointing"]
    # Where layers don't come in blocks of NF4.
    odd = replace(arch, intermediate_size=1530)
    assert told(lora, odd, frozen * 9 // 10) == ["use 2 workers"]
    assert told(lora, odd, frozen // 100) == ["take a smaller model, or larger nodes"]


def test_lora_is_proposed_with_the_settings_that_it_was_found_to_fit_with(arch: Architecture, tmp_path: Path) -> None:
    arch = replace(arch, hidden_size=512, intermediate_size=1536, num_layers=30, windows=(None,) * 30)
    full, lora = (plan_for(tmp_path / "m", custom) for custom in ({"finetuning_type": "full"}, LORA))
    recomputed = lora.model_copy(update={"enable_activation_checkpointing": True})
    load = LOAD._replace(positions=4000)
    enough, needed, too_much = (memory_of(plan, arch, load, "cpu").peak_bytes for plan in (recomputed, lora, full))
    assert enough < too_much / MARGIN < needed
    there = int(too_much / MARGIN) - 1
    with pytest.raises(CapacityError, match="train with LoRA and enable_activation_checkpointing"):
        check_memory(full, arch, load, there)
    check_memory(recomputed, arch, load, there)


def test_a_request_is_refused_at_once_if_weights_and_optimizer_alone_do_not_fit(
    arch: Architecture, tmp_path: Path
) -> None:
    full, lora = (plan_for(tmp_path / "m", custom) for custom in (FULL, LORA))
    there = int(3 * 4 * numbers_of(arch) / MARGIN) - 100
    problem = states_fit(full, arch, there)
    assert problem is not None
    assert problem.code == "does_not_fit"
    assert states_fit(full, arch, there + 200) is None
    assert states_fit(lora, arch, there) is None

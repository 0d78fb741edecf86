"""The recipe on two ranks (FSDP2 over gloo; whole models for adapters): same numbers as on one, and exact resuming."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import make_tiny_model
from tests.trainers.recipe_support import (
    Case,
    TwoRanks,
    make_plan_for,
    random_pairs,
    random_rows,
    saved_weights,
    store_in_bf16,
    write_rows,
)
from tests.waiting import eventually
from trainers.planning.components import DPO_LOSS
from trainers.planning.plan import ComponentSpec, LoraSpec
from trainers.training import checkpoint
from trainers.training.batches import Progress
from trainers.training.checkpoint import CheckpointWriter
from trainers.training.distributed import Ranks


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(
        make_plan_for(batch_size=4),
        make_tiny_model(tmp_path / "tiny"),
        write_rows(tmp_path / "train", random_rows(21)),
        tmp_path / "one",
        write_rows(tmp_path / "valid", random_rows(7, seed=1)),
    )


def split(case: Case) -> Case:
    """The case with the same global batches on two workers."""
    plan = case.plan.model_copy(update={"batch_size": case.plan.batch_size // 2, "nproc_per_node": 2})
    return replace(case, plan=plan, output_dir=case.output_dir.with_name("two"))


def both(losses: dict[int, Any]) -> list[Any]:
    return [losses[step] for step in sorted(losses)]


SHARDED_APART = {"memory_efficient_fsdp_wrap": True, "enable_activation_checkpointing": True, "fsdp_cpu_offload": True}


@pytest.mark.parametrize(
    ("method", "family", "changes"),
    [
        ("lora", "llama", {"gradient_accumulation_steps": 2, "clip_grad_norm": 0.5}),
        ("lora", "llama", {"gradient_accumulation_steps": 2, "memory_efficient_fsdp_wrap": True}),
        ("full", "llama", {"clip_grad_norm": 0.5, "run_val_every_n_steps": 2}),
        ("full", "mistral", SHARDED_APART),
        ("full", "llama", {"optimizer": ComponentSpec(component="torch.optim.SGD", kwargs={"fused": True})}),
        ("full", "mistral", {"gradient_accumulation_steps": 3, "packed": True, "max_seq_len": 30}),
        ("lora", "mistral", SHARDED_APART | {"lora": LoraSpec(mlp=True, output=True)}),
        ("dora", "mistral", SHARDED_APART | {"lora": LoraSpec(mlp=True, output=True)}),
        ("qlora", "blocks", {"gradient_accumulation_steps": 2}),
    ],
)
def test_two_workers_give_the_numbers_of_one(
    two_ranks: TwoRanks, case: Case, tmp_path: Path, method: str, family: str, changes: dict[str, Any]
) -> None:
    case.plan = make_plan_for(method, batch_size=4, **changes)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}  # whole blocks of NF4
    family, sizes = ("llama", sizes) if family == "blocks" else (family, {})
    case.model_dir = make_tiny_model(tmp_path / family, family, **sizes)
    one = case.run()
    first, second = two_ranks.run(Case.run, split(case))
    assert both(first.losses) == pytest.approx(both(one.losses), abs=2e-5)
    norms = [metrics.grad_norm for metrics in one.steps]
    assert [metrics.grad_norm for metrics in first.steps] == (pytest.approx(norms, rel=1e-4) if norms[0] else norms)
    assert [m.tokens for m in first.steps] == [m.tokens for m in one.steps]
    assert [m.valid_loss for m in first.evaluations] == pytest.approx([m.valid_loss for m in one.evaluations], abs=2e-5)
    assert (second.steps, second.evaluations, second.checkpoints) == ([], [], [])
    alone, together = (saved_weights(run.checkpoints[-1].path) for run in (one, first))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, SHARDED_APART | {"gradient_accumulation_steps": 2}])
def test_two_workers_round_as_one_does(
    two_ranks: TwoRanks, case: Case, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """With an untied head, and with one rank that has no row in the last step. The learning rate is so low that no
    weight is rounded to another 4-bit number: after that, runs that differ in the last bit diverge."""
    case.plan = make_plan_for("qat", batch_size=4, n_epochs=1, lr=1e-5, clip_grad_norm=0.5, **changes)
    case.model_dir = make_tiny_model(tmp_path / "mistral", "mistral")
    one = case.run()
    together, _ = two_ranks.run(Case.run, split(case))
    assert both(together.losses) == pytest.approx(both(one.losses), abs=2e-5)
    assert [m.grad_norm for m in together.steps] == pytest.approx([m.grad_norm for m in one.steps], rel=1e-4)
    assert [m.valid_loss for m in together.evaluations] == pytest.approx(
        [m.valid_loss for m in one.evaluations], abs=2e-5
    )
    before = load_file(case.model_dir / "model.safetensors")
    alone, both_ranks = (saved_weights(run.checkpoints[-1].path) for run in (one, together))
    for name, tensor in alone.items():
        assert (both_ranks[name] - tensor).norm() < 0.02 * (tensor - before[name]).norm(), name


@pytest.mark.parametrize(("method", "dtype"), [("lora", "fp32"), ("full", "fp32"), ("qat", "fp32"), ("full", "mixed")])
def test_two_workers_resume_exactly_in_mid_epoch(two_ranks: TwoRanks, case: Case, method: str, dtype: str) -> None:
    lora = LoraSpec(dropout=0.2) if method == "lora" else None
    case = split(replace(case, plan=make_plan_for(method, batch_size=4, lora=lora, dtype=dtype)))
    if dtype == "mixed":
        store_in_bf16(case.model_dir)
    whole, _ = two_ranks.run(Case.run, case)
    part, _ = two_ranks.run(Case.run, replace(case, output_dir=case.output_dir / "part", stop_at=3))
    stopped = part.checkpoints[-1].path
    rest, _ = two_ranks.run(Case.run, replace(case, output_dir=case.output_dir / "part", resume_from=stopped))
    assert part.losses | rest.losses == whole.losses
    assert list(rest.losses) == list(range(4, whole.total_steps + 1))
    expected = saved_weights(whole.checkpoints[-1].path)
    for name, tensor in saved_weights(rest.checkpoints[-1].path).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("changes", [{}, SHARDED_APART])
def test_two_workers_train_mixed_as_one_does(two_ranks: TwoRanks, case: Case, changes: dict[str, Any]) -> None:
    case.plan = make_plan_for("full", batch_size=4, dtype="mixed", lr=1e-4, **changes)
    store_in_bf16(case.model_dir)
    one = case.run()
    together, _ = two_ranks.run(Case.run, split(case))
    assert both(together.losses) == pytest.approx(both(one.losses), abs=0.01)  # gradients in bf16 are added up
    alone, both_ranks = (saved_weights(run.checkpoints[-1].path) for run in (one, together))
    before = load_file(case.model_dir / "model.safetensors")
    for name, tensor in alone.items():
        assert tensor.dtype == both_ranks[name].dtype == torch.float32
        assert (both_ranks[name] - tensor).norm() < 0.2 * (tensor - before[name]).norm(), name


@pytest.mark.parametrize(("method", "family"), [("lora", "llama"), ("full", "mistral")])
def test_two_workers_prefer_as_one_does_and_resume_exactly(
    two_ranks: TwoRanks, case: Case, tmp_path: Path, method: str, family: str
) -> None:
    changes: dict[str, Any] = SHARDED_APART if method == "full" else {}
    loss = ComponentSpec(component=DPO_LOSS, kwargs={"beta": 0.2})
    case = replace(
        case,
        plan=make_plan_for(method, batch_size=4, loss=loss, **changes),
        model_dir=make_tiny_model(tmp_path / family, family),
        train_data=write_rows(tmp_path / "pairs", random_pairs(13)),  # the last step leaves one rank without a pair
        valid_data=write_rows(tmp_path / "valid_pairs", random_pairs(3, seed=1)),
    )
    one = case.run()
    together, _ = two_ranks.run(Case.run, split(case))
    assert both(together.losses) == pytest.approx(both(one.losses), abs=5e-5)
    assert [m.rewards_margin for m in together.steps] == pytest.approx([m.rewards_margin for m in one.steps], abs=2e-3)
    assert [m.rewards_accuracy for m in together.steps][-1] == [m.rewards_accuracy for m in one.steps][-1]
    assert [m.valid_loss for m in together.evaluations] == pytest.approx(
        [m.valid_loss for m in one.evaluations], abs=5e-5
    )
    part = replace(split(case), output_dir=case.output_dir.with_name("part"))
    stopped, _ = two_ranks.run(Case.run, replace(part, stop_at=2))
    rest, _ = two_ranks.run(Case.run, replace(part, resume_from=stopped.checkpoints[-1].path))
    assert stopped.losses | rest.losses == together.losses


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_two_workers_saved_one_resumes(two_ranks: TwoRanks, case: Case, method: str) -> None:
    adam = ComponentSpec(component="torch.optim.AdamW", kwargs={"fused": True})
    case = replace(case, plan=make_plan_for(method, batch_size=4, optimizer=adam))
    one = case.run()
    part, _ = two_ranks.run(Case.run, replace(split(case), stop_at=4))
    rest = replace(case, resume_from=part.checkpoints[-1].path, output_dir=case.output_dir / "rest").run()
    assert both(part.losses | rest.losses) == pytest.approx(both(one.losses), abs=5e-5)


def test_adapters_on_two_workers_train_with_a_compressed_state_as_on_one_and_resume_exactly(
    two_ranks: TwoRanks, case: Case
) -> None:
    optimizer = ComponentSpec(component="torchao.optim.AdamW8bit")
    case.plan = make_plan_for(batch_size=4, lora=LoraSpec(rank=64), optimizer=optimizer)  # large enough to be held so
    one = _run_eager(case)
    together, _ = two_ranks.run(_run_eager, split(case))
    assert both(together.losses) == pytest.approx(both(one.losses), abs=2e-3)
    part = replace(split(case), output_dir=case.output_dir.with_name("part"))
    stopped, _ = two_ranks.run(_run_eager, replace(part, stop_at=4))
    rest, _ = two_ranks.run(_run_eager, replace(part, resume_from=stopped.checkpoints[-1].path))
    assert stopped.losses | rest.losses == together.losses


def _run_eager(case: Case) -> Any:
    """Runs the case without torchao's compilation of its update, which takes long."""
    with torch.compiler.set_stance("force_eager"):
        return case.run()


def test_a_compressed_state_on_sharded_parameters_is_refused(two_ranks: TwoRanks, case: Case) -> None:
    """Adapters are sharded if each worker can't hold the whole model."""
    case.plan = make_plan_for(optimizer=ComponentSpec(component="torchao.optim.AdamW8bit"), fsdp_cpu_offload=True)
    with pytest.raises(AssertionError, match="can't be sharded"):
        two_ranks.run(Case.run, split(case))


def test_ranks_wait_for_a_slow_disk_in_many_short_collective_calls(two_ranks: TwoRanks, case: Case) -> None:
    """A single collective call would time out."""
    case.plan = make_plan_for(save_every_n_steps=10, memory_efficient_fsdp_wrap=True)
    first, _ = two_ranks.run(_run_with_a_slow_disk, split(case))
    assert [c.step for c in first.checkpoints] == [10, 11, 20, 22]


def _run_with_a_slow_disk(case: Case) -> Any:
    """Runs the case. The checkpoint of step 10 isn't written before the ranks, which wait for it to save the next one,
    have called `Ranks.sum` three times."""
    sums: list[float] = []
    add_up, write = Ranks.sum, CheckpointWriter._write

    def counted(ranks: Ranks, values: Sequence[float]) -> list[float]:
        sums.extend(values)
        return add_up(ranks, values)

    def slowly(writer: CheckpointWriter, progress: Progress, *rest: Any) -> None:
        before = len(sums)
        if progress.step == 10:
            eventually(lambda: len(sums) >= before + 3, 30, lambda: "the ranks don't call Ranks.sum")
        write(writer, progress, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOOK_S", 0.01)
        patch.setattr(Ranks, "sum", counted)
        patch.setattr(CheckpointWriter, "_write", slowly)
        return case.run()


def test_one_ranks_wish_to_stop_stops_both_after_the_same_step(two_ranks: TwoRanks, case: Case) -> None:
    first, second = two_ranks.run(_run_stopping_rank_1, split(case))
    assert list(first.losses) == [1, 2, 3]
    assert [c.step for c in first.checkpoints] == [3]
    assert second.checkpoints == []


def _run_stopping_rank_1(case: Case) -> Any:
    wishes = 3 if torch.distributed.get_rank() == 1 else None
    return replace(case, stop_at=wishes).run()

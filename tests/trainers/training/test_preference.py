"""DPO: the loss and gradients are torchtune's; a run starts at ln 2, learns, and resumes to the same bits."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchtune.rlhf.loss import DPOLoss

from tests.power_cut import PowerCut
from tests.tiny_models import make_tiny_model
from tests.trainers.recipe_support import Case, known, make_plan_for, random_pairs, saved_weights, write_rows
from trainers.data.dataset import TokenisedDataset
from trainers.errors import InfrastructureError
from trainers.methods import method_of
from trainers.models.architecture import inspect_model_dir
from trainers.planning.components import DPO_LOSS
from trainers.planning.plan import REFERENCE, ComponentSpec, LoraSpec
from trainers.training.batches import rows_of_pair
from trainers.training.collate import collate
from trainers.training.distributed import Ranks
from trainers.training.training_model import build_training_model

PAIRS = 11


def dpo(**kwargs: Any) -> ComponentSpec:
    return ComponentSpec(component=DPO_LOSS, kwargs=kwargs)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(
        make_plan_for(loss=dpo()),
        make_tiny_model(tmp_path / "tiny"),
        write_rows(tmp_path / "train", random_pairs(PAIRS)),
        tmp_path / "run",
        write_rows(tmp_path / "valid", random_pairs(3, seed=1)),
    )


@pytest.mark.parametrize(("method", "family"), [("full", "llama"), ("full", "mistral"), ("lora", "mistral")])
def test_loss_rewards_and_gradients_are_torchtunes_on_log_probabilities_of_plain_logits(
    tmp_path: Path, method: str, family: str
) -> None:
    lora = LoraSpec(mlp=True, output=True) if method == "lora" else None
    plan = make_plan_for(method, lora=lora, loss=dpo(beta=0.3, label_smoothing=0.2))
    model_dir = make_tiny_model(tmp_path / family, family)
    arch = inspect_model_dir(model_dir)
    data = TokenisedDataset(write_rows(tmp_path / "data", random_pairs(3)))
    model = build_training_model(plan, method_of(plan), arch, model_dir, None, "fp32", Ranks.current())
    model.head.chunks = 4
    reference = torch.linspace(-60, -20, 6)
    batch = collate(data, [rows_of_pair(pair) for pair in range(3)], reference=reference)
    measured = model(batch)

    def log_probability(row: int) -> Tensor:
        tokens, mask = (torch.tensor(part) for part in data[row])
        logps = model.decoder(tokens[None, :-1].long())[0].log_softmax(-1)
        logp: Tensor = logps.gather(1, tokens[1:, None].long())[:, 0][mask[1:]].sum()
        return logp

    logps = torch.stack([log_probability(row) for row in range(6)])
    losses, chosen, rejected = DPOLoss(0.3, 0.2)(logps[0::2], logps[1::2], reference[0::2], reference[1::2])
    torch.testing.assert_close(measured.loss, losses.sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(measured.logps, logps.detach(), atol=1e-4, rtol=1e-5)
    expected = torch.stack([chosen.sum(), rejected.sum(), (chosen > rejected).sum(), (chosen - rejected).sum()])
    torch.testing.assert_close(measured.measures.float(), expected, atol=1e-4, rtol=1e-5)
    parameters = list(model.trainable().values())
    plain = torch.autograd.grad(losses.sum(), parameters)
    for ours, theirs in zip(torch.autograd.grad(measured.loss, parameters), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_starts_at_the_reference_and_learns_to_prefer_the_chosen(case: Case, method: str) -> None:
    case.plan = make_plan_for(method, loss=dpo(), n_epochs=5, lr=1e-3 if method == "full" else 1e-2)
    run = case.run()
    first, last = run.steps[0], run.steps[-1]
    assert first.loss == pytest.approx(math.log(2), abs=1e-5)
    assert first.rewards_margin == pytest.approx(0, abs=1e-5)
    assert last.rewards_accuracy == 1
    assert last.rewards_margin == pytest.approx(known(last.rewards_chosen) - known(last.rewards_rejected))
    assert known(last.rewards_margin) > 0.5
    assert known(last.loss) < 0.5
    evaluations = [known(m.valid_loss) for m in run.evaluations]
    assert evaluations[0] == pytest.approx(math.log(2), abs=1e-5)
    assert evaluations[-1] < evaluations[0] - 0.05
    assert run.checkpoints[-1].metrics["rewards_accuracy"] == last.rewards_accuracy


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_was_stopped_in_mid_epoch_goes_on_to_the_same_bits(case: Case, method: str) -> None:
    lora = LoraSpec(dropout=0.2) if method == "lora" else None
    case.plan = make_plan_for(method, loss=dpo(), lora=lora, clip_grad_norm=1.0)
    whole = case.run()
    part = replace(case, output_dir=case.output_dir / "part", stop_at=4).run()
    rest = replace(case, output_dir=case.output_dir / "part", resume_from=part.checkpoints[-1].path).run()
    assert list(part.losses) == [1, 2, 3, 4]
    assert part.losses | rest.losses == whole.losses
    assert [m.rewards_margin for m in part.steps + rest.steps] == [m.rewards_margin for m in whole.steps]
    assert [m.valid_loss for m in part.evaluations + rest.evaluations] == [m.valid_loss for m in whole.evaluations]
    expected = saved_weights(whole.checkpoints[-1].path)
    for name, tensor in saved_weights(rest.checkpoints[-1].path).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_power_cut_doesn_t_take_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    power_cut = PowerCut(monkeypatch)
    replace(case, stop_at=1).run()
    assert power_cut.leaves(case.output_dir / REFERENCE)


def test_a_run_can_not_go_on_without_its_reference(case: Case) -> None:
    part = replace(case, stop_at=2).run()
    assert load_file(case.output_dir / REFERENCE)["training"].shape == (2 * PAIRS,)
    reference = case.output_dir / REFERENCE
    reference.write_bytes(reference.read_bytes()[:-4])
    for damage in ("cut short", "gone"):
        if damage == "gone":
            reference.unlink()
        with pytest.raises(InfrastructureError, match="log-probabilities") as caught:
            replace(case, resume_from=part.checkpoints[-1].path).run()
        assert caught.value.error.code == "reference_missing"


def test_a_run_that_begins_again_measures_a_damaged_reference_anew(case: Case) -> None:
    first = replace(case, stop_at=1).run()
    reference = case.output_dir / REFERENCE
    whole = reference.read_bytes()
    reference.write_bytes(whole[:-4])
    assert replace(case, stop_at=1).run().losses == first.losses
    assert reference.read_bytes() == whole


def test_a_run_that_begins_again_uses_the_reference_that_is_there(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tunewright.train"):
        first = replace(case, stop_at=1).run()
        assert sum(record.getMessage().startswith("reference model: done") for record in caplog.records) == 2
        caplog.clear()
        assert replace(case, stop_at=1).run().losses == first.losses
    lines = [record.getMessage() for record in caplog.records]
    assert not [line for line in lines if line.startswith("reference model")]
    (step,) = [line for line in lines if line.startswith("step ")]
    assert " | chosen " in step
    assert " | accuracy " in step


def test_accumulating_four_pairs_one_by_one_equals_a_batch_of_four(case: Case) -> None:
    alternatives: list[dict[str, Any]] = [{"batch_size": 1, "gradient_accumulation_steps": 4}, {"batch_size": 4}]
    runs = [
        replace(case, plan=make_plan_for(loss=dpo(), **sizes), output_dir=case.output_dir / str(number)).run()
        for number, sizes in enumerate(alternatives)
    ]
    assert list(runs[0].losses.values()) == pytest.approx(list(runs[1].losses.values()), abs=1e-5)
    margins = [[m.rewards_margin for m in run.steps] for run in runs]
    assert margins[0] == pytest.approx(margins[1], abs=1e-4)


def test_a_smoothed_loss_is_bounded_from_below(case: Case) -> None:
    smooth = replace(case, plan=make_plan_for(loss=dpo(label_smoothing=0.4), n_epochs=5)).run()
    floor = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))  # where a pair's odds are those of the label
    assert smooth.steps[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert min(smooth.losses.values()) > floor - 1e-6


def test_supervised_runs_say_nothing_of_rewards(case: Case) -> None:
    run = replace(case, plan=make_plan_for(n_epochs=1)).run()
    assert not (case.output_dir / REFERENCE).exists()
    assert {m.rewards_margin for m in run.steps} == {None}
    assert not [name for name in run.checkpoints[-1].metrics if name.startswith("rewards")]

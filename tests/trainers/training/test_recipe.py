"""The recipe on one worker: it learns, it counts tokens, and no setting that should not matter does."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from tests.tiny_models import make_tiny_model
from tests.trainers.recipe_support import (
    Case,
    Recorder,
    known,
    make_plan_for,
    random_rows,
    saved_weights,
    store_in_bf16,
    write_rows,
)
from trainers.errors import CapacityError, UserError
from trainers.methods import method_of
from trainers.methods.lora import adapter_parameters, initial_adapter
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder
from trainers.models.weights import load_weights
from trainers.planning.plan import ComponentSpec, LoraSpec, Plan
from trainers.training import optimization
from trainers.training.distributed import Ranks
from trainers.training.recipe import clip
from trainers.training.training_model import build_training_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_in_bf16(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def tiny_rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in fp32 whose values are bf16 numbers, as of a bf16 model that was loaded in fp32 and saved again."""
    path = store_in_bf16(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))
    file = path / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train", random_rows(21))


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "valid", random_rows(7, seed=1))


class Bench:
    """Runs plans on the tiny model, each in a directory of its own."""

    def __init__(self, tiny: Path, data: Path, tmp_path: Path) -> None:
        self._tiny, self._data, self._root = tiny, data, tmp_path
        self._runs = 0

    def case(self, method: str = "lora", data: Path | None = None, **changes: Any) -> Case:
        case_fields = {name: changes.pop(name) for name in ("valid_data", "resume_from", "stop_at") if name in changes}
        self._runs += 1
        output = self._root / f"run{self._runs}"
        return Case(make_plan_for(method, **changes), self._tiny, data or self._data, output, **case_fields)

    def losses(self, method: str = "lora", **changes: Any) -> list[float]:
        losses = list(self.case(method, **changes).run().losses.values())
        assert all(math.isfinite(loss) for loss in losses)
        return losses


@pytest.fixture
def bench(tiny: Path, data: Path, tmp_path: Path) -> Bench:
    return Bench(tiny, data, tmp_path)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_lowers_the_loss_of_data_it_has_not_seen(bench: Bench, valid: Path, method: str) -> None:
    run = bench.case(method, valid_data=valid, n_epochs=6).run()
    evaluations = [(m.step, m.epoch, known(m.valid_loss)) for m in run.evaluations]
    assert [(step, epoch) for step, epoch, _ in evaluations] == [(11 * epoch, epoch) for epoch in range(7)]
    assert evaluations[-1][2] < evaluations[0][2] - 0.3
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(11 * epoch, epoch) for epoch in range(1, 7)]
    assert run.checkpoints[-1].metrics["valid_loss"] == evaluations[-1][2]


def test_the_same_plan_gives_the_same_run_and_another_seed_another(bench: Bench) -> None:
    lora = LoraSpec(dropout=0.3)
    assert bench.losses(lora=lora, seed=1) == bench.losses(lora=lora, seed=1)
    assert bench.losses(lora=lora, seed=1) != bench.losses(lora=lora, seed=2)


def test_lora_starts_at_the_base_model(bench: Bench) -> None:
    assert bench.losses("lora")[0] == pytest.approx(bench.losses("full")[0], abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulating_four_rows_one_by_one_equals_a_batch_of_four(bench: Bench, method: str) -> None:
    one_by_one = bench.losses(method, batch_size=1, gradient_accumulation_steps=4)
    assert one_by_one == pytest.approx(bench.losses(method, batch_size=4), abs=2e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_activation_checkpointing_changes_no_number(bench: Bench, method: str) -> None:
    lora = LoraSpec(dropout=0.3) if method == "lora" else None  # the dropout of the second pass is that of the first
    plain = bench.losses(method, lora=lora)
    assert bench.losses(method, lora=lora, enable_activation_checkpointing=True) == plain


@pytest.mark.parametrize(
    ("method", "component", "dtype"),
    [
        ("full", "torch.optim.AdamW", "fp32"),
        ("full", "torch.optim.AdamW", "mixed"),
        ("full", "torch.optim.SGD", "fp32"),
        ("full", "torchao.optim.AdamW8bit", "fp32"),
        ("qat", "torch.optim.AdamW", "bf16"),
    ],
)
def test_updating_within_the_backward_pass_changes_no_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, component: str, dtype: str
) -> None:
    monkeypatch.setattr(optimization, "TOGETHER", 2000)  # a few layers of the tiny model
    changes: dict[str, Any] = {"optimizer": ComponentSpec(component=component), "dtype": dtype}
    within = bench.case(method, **changes).run()
    assert make_plan_for(method, **changes).updates_in_backward
    monkeypatch.setattr(Plan, "updates_in_backward", property(lambda _: False))
    after = bench.case(method, **changes).run()
    assert within.losses == after.losses
    expected = saved_weights(after.checkpoints[-1].path)
    for name, tensor in saved_weights(within.checkpoints[-1].path).items():
        assert torch.equal(tensor, expected[name]), name


def test_packed_rows_have_the_loss_of_rows_on_their_own(bench: Bench) -> None:
    packed = bench.losses(packed=True, max_seq_len=24 * 21, batch_size=1, n_epochs=3)
    alone = bench.losses(batch_size=21, n_epochs=3, shuffle=False)
    assert packed == pytest.approx(alone, abs=2e-6)


def test_tokens_outside_the_mask_carry_no_loss(bench: Bench, tmp_path: Path) -> None:
    rows = random_rows(8)
    other_prompts = [([t if m else 7 for t, m in zip(*row, strict=True)], row[1]) for row in rows]
    longer = [([*tokens, 9, 9, 9], [*mask, False, False, False]) for tokens, mask in rows]
    base = bench.losses(data=write_rows(tmp_path / "a", rows), n_epochs=1)
    assert bench.losses(data=write_rows(tmp_path / "b", longer), n_epochs=1) == pytest.approx(base, abs=2e-6)
    assert bench.losses(data=write_rows(tmp_path / "c", other_prompts), n_epochs=1) != pytest.approx(base, abs=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_equal_a_plain_loop_over_torchtunes_parts(bench: Bench, tiny: Path, tmp_path: Path, method: str) -> None:
    """The textbook loop: all logits, torchtune's loss, mean gradient, clip, AdamW, cosine schedule."""
    rows = random_rows(12)
    plan = bench.case(method).plan
    arch = inspect_model_dir(tiny)
    decoder = build_decoder(arch, linear=method_of(plan).linear)
    decoder.load_state_dict(load_weights(tiny, arch), strict=False)
    decoder.load_state_dict(initial_adapter(decoder, plan.seed), strict=False)
    decoder.set_num_output_chunks(8)
    parameters = list((adapter_parameters(decoder) if plan.lora else dict(decoder.named_parameters())).values())
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 12)
    expected = []
    for step in range(12):
        optimizer.zero_grad()
        losses, counts = [], []
        for tokens, mask in (rows[2 * step % 12], rows[(2 * step + 1) % 12]):
            labels = torch.where(torch.tensor(mask), torch.tensor(tokens), -100)[1:]
            count = int((labels != -100).sum())
            losses.append(CEWithChunkedOutputLoss()(decoder(torch.tensor([tokens[:-1]])), labels[None]) * count)
            counts.append(count)
        loss = sum(losses) / sum(counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    cosine = make_plan_for().lr_scheduler
    assert cosine is not None
    ours = bench.losses(
        method,
        data=write_rows(tmp_path / "a", rows),
        shuffle=False,
        batch_size=1,
        gradient_accumulation_steps=2,
        clip_grad_norm=0.5,
        lr_scheduler=cosine.model_copy(update={"kwargs": {"num_warmup_steps": 2}}),
    )
    assert ours == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_compiled_layers_and_loss_give_the_same_numbers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # traces as inductor does, without its minute of C++
    changes = {"enable_activation_checkpointing": method == "full", "max_steps_per_epoch": 3}
    assert bench.losses(method, compile=True, **changes) == pytest.approx(bench.losses(method, **changes), abs=5e-6)


def test_a_micro_batch_without_a_trained_token_is_harmless(bench: Bench, tmp_path: Path) -> None:
    rows = random_rows(4)
    silent = ([5, 6, 7], [True, False, False])  # the first token of a row is never predicted
    data = write_rows(tmp_path / "a", [rows[0], silent, *rows[1:], silent])
    with_silent = bench.losses(data=data, batch_size=1, gradient_accumulation_steps=6, shuffle=False)
    without = bench.losses(
        data=write_rows(tmp_path / "b", rows), batch_size=1, gradient_accumulation_steps=4, shuffle=False
    )
    assert with_silent == pytest.approx(without, abs=1e-6)


def test_metrics_name_every_step(bench: Bench) -> None:
    run = bench.case(clip_grad_norm=0.5, log_every_n_steps=100, gradient_accumulation_steps=2).run()
    assert [m.step for m in run.steps] == list(range(1, run.total_steps + 1))
    assert [m.epoch for m in run.steps] == [1] * 6 + [2] * 6
    for metrics in run.steps:
        assert metrics.tokens
        assert metrics.tokens_per_second
        assert metrics.peak_memory_bytes
        assert metrics.grad_norm


def test_clipping_bounds_the_update(bench: Bench, tiny: Path) -> None:
    sgd = ComponentSpec(component="torch.optim.SGD")
    case = bench.case(
        "full", clip_grad_norm=0.01, lr=1.0, optimizer=sgd, lr_scheduler=None, n_epochs=1, max_steps_per_epoch=1
    )
    after, before = saved_weights(case.run().checkpoints[-1].path), saved_weights(tiny)
    change = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
    assert change.item() == pytest.approx(0.01, rel=1e-3)


def test_gradients_that_are_offloaded_are_clipped_where_they_lie_by_a_norm_on_the_device() -> None:
    """nccl can't add up the ranks' norms in host memory."""
    with FakeTensorMode():  # knows devices, and computes nothing
        ranks = Ranks(0, 1, torch.device("cuda", 0))
        gradients = [torch.ones(4, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.bfloat16)]
        norm = clip(gradients, 1.0, ranks, summed=False)
    assert norm.device == ranks.device
    assert {gradient.device.type for gradient in gradients} == {"cpu"}


@pytest.mark.parametrize(
    ("component", "kwargs"),
    [
        ("torch.optim.Adam", {"betas": [0.8, 0.9], "eps": 1e-6, "amsgrad": True, "foreach": True}),
        ("torch.optim.AdamW", {"weight_decay": 0.1, "fused": True}),
        ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_every_optimizer_trains_and_resumes_exactly(bench: Bench, component: str, kwargs: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"optimizer": ComponentSpec(component=component, kwargs=kwargs), "lr": 1e-3}
    whole = bench.case("full", **changes).run()
    part = bench.case("full", stop_at=4, **changes).run()
    rest = bench.case("full", resume_from=part.checkpoints[-1].path, **changes).run()
    assert part.losses | rest.losses == whole.losses


def test_the_learning_rate_warms_up_and_falls_to_zero(bench: Bench) -> None:
    scheduler = make_plan_for().lr_scheduler
    assert scheduler is not None
    scheduler = scheduler.model_copy(update={"kwargs": {"num_warmup_steps": 2}})
    rates = [known(m.lr) for m in bench.case(lr=1.0, lr_scheduler=scheduler).run().steps]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 19 / 20)))
    assert {m.lr for m in bench.case(lr=0.01, lr_scheduler=None).run().steps} == {0.01}


def test_label_smoothing_is_honoured(bench: Bench) -> None:
    smooth = ComponentSpec(component="torch.nn.CrossEntropyLoss", kwargs={"label_smoothing": 0.5})
    plain = ComponentSpec(component="torch.nn.CrossEntropyLoss")
    assert bench.losses(loss=plain) == pytest.approx(bench.losses(), abs=1e-6)
    assert bench.losses(loss=smooth)[0] != pytest.approx(bench.losses()[0], abs=1e-2)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma", "phi3"])
def test_every_family_trains(bench: Bench, tmp_path: Path, family: str) -> None:
    for method in ("lora", "full"):
        case = bench.case(method, n_epochs=3)
        case.model_dir = make_tiny_model(tmp_path / family, family)
        losses = list(case.run().losses.values())
        assert sum(losses[-3:]) < sum(losses[:3])


def test_adapters_on_every_layer_train(bench: Bench, tmp_path: Path) -> None:
    case = bench.case(lora=LoraSpec(mlp=True, output=True), n_epochs=1)
    case.model_dir = make_tiny_model(tmp_path / "m", "mistral")
    weights = saved_weights(case.run().checkpoints[-1].path)
    assert all(tensor.any() for tensor in weights.values())
    assert {name.split(".")[-3] for name in weights} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    }


def test_bf16_is_stored_and_trained_as_bf16(bench: Bench) -> None:
    run = bench.case("full", dtype="bf16").run()
    weights = saved_weights(run.checkpoints[-1].path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert run.losses[22] < run.losses[1]


@pytest.mark.parametrize(
    ("method", "within", "stored"),
    [
        ("full", 0.05, "tiny"),
        ("full", 0.05, "tiny_in_bf16"),
        ("full", 0.05, "tiny_rounded"),
        ("qat", 0.3, "tiny"),
        ("qat", 0.3, "tiny_in_bf16"),
    ],
)
def test_mixed_learns_what_fp32_does_where_bf16_loses_its_small_updates(
    request: pytest.FixtureRequest, data: Path, tmp_path: Path, method: str, within: float, stored: str
) -> None:
    """The learning rate is so low that most updates are smaller than half a bf16 step of their weight. (With weights
    rounded to 4 bits, gradients that differ in their last bits make gains differ by a tenth.)"""
    bench = Bench(request.getfixturevalue(stored), data, tmp_path)
    gains = {}
    for dtype in ("fp32", "mixed", "bf16"):
        losses = bench.losses(method, dtype=dtype, lr=5e-6, n_epochs=6, shuffle=False, lr_scheduler=None)
        gains[dtype] = sum(losses[:11]) - sum(losses[-11:])
    assert gains["mixed"] == pytest.approx(gains["fp32"], rel=within)
    assert gains["bf16"] < 0.1 * gains["fp32"]


def test_mixed_begins_with_the_model_as_it_is_stored(tiny_in_bf16: Path) -> None:
    """The fp32 copies round to the stored weights, but half of them are larger than these."""
    plan, ranks, arch = make_plan_for("full"), Ranks(0, 1, torch.device("cpu")), inspect_model_dir(tiny_in_bf16)
    model = build_training_model(plan, method_of(plan), arch, tiny_in_bf16, None, "mixed", ranks)
    larger = []
    for name, stored in load_weights(tiny_in_bf16, arch).items():
        assert torch.equal(model.trainable()[name], stored), name
        assert torch.equal(model.copies[name].to(torch.bfloat16), stored), name
        larger.append((model.copies[name] > stored).flatten())
    assert torch.cat(larger).float().mean() == pytest.approx(0.5, abs=0.01)


def test_mixed_keeps_what_is_trained_in_fp32(bench: Bench, tiny: Path) -> None:
    run = bench.case("full", dtype="mixed", lr=1e-6).run()
    before = load_weights(tiny, inspect_model_dir(tiny))
    after = load_weights(run.checkpoints[-1].path, inspect_model_dir(tiny))
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert 0 < (tensor - before[name]).abs().max() < 1e-4, name  # they began as they were stored, not rounded


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"clip_grad_norm": 0.1}])
def test_mixed_updates_by_the_gradients_of_bf16(bench: Bench, changes: dict[str, Any]) -> None:
    mixed, bf16 = (bench.losses("full", dtype=dtype, lr=1e-4, n_epochs=1, **changes) for dtype in ("mixed", "bf16"))
    assert mixed[0] == bf16[0]
    assert mixed == pytest.approx(bf16, abs=0.05)


def test_a_loss_that_is_not_finite_ends_the_job_and_names_the_step(bench: Bench) -> None:
    sgd = ComponentSpec(component="torch.optim.SGD")
    with pytest.raises(UserError, match=r"the loss of step \d+ is (nan|inf)") as caught:
        bench.case("full", lr=1e30, optimizer=sgd, lr_scheduler=None).run()
    assert (caught.value.error.code, caught.value.error.rank) == ("loss_not_finite", 0)


def test_a_model_that_is_broken_to_begin_with_is_not_said_to_have_diverged(data: Path, tmp_path: Path) -> None:
    file = make_tiny_model(tmp_path / "broken") / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, file)
    with pytest.raises(UserError, match="the loss of step 1 is nan, before anything was trained") as caught:
        Bench(file.parent, data, tmp_path).case("full").run()
    assert (caught.value.error.code, caught.value.error.param) == ("model_broken", "model")


@pytest.mark.parametrize("changes", [{}, {"run_val_every_n_steps": 1, "early_stopping_patience": 1, "n_epochs": 2}])
def test_an_update_that_breaks_the_model_leaves_no_checkpoint_of_it(
    bench: Bench, valid: Path, changes: dict[str, Any]
) -> None:
    """Only the loss of the next step would show it, and there may be none."""
    sgd = ComponentSpec(component="torch.optim.SGD")
    recorder = Recorder()
    few: dict[str, Any] = {"n_epochs": 1, "max_steps_per_epoch": 2, "valid_data": valid}
    case = bench.case("full", lr=1e30, optimizer=sgd, lr_scheduler=None, **(few | changes))
    with pytest.raises(UserError, match=r"the update of step \d left weights that are not numbers") as caught:
        case.run(recorder)
    assert caught.value.error.code == "loss_not_finite"
    assert recorder.checkpoints == []


def test_running_out_of_memory_comes_with_advice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **__: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr("trainers.training.recipe.training_step", allocate)
    with pytest.raises(CapacityError, match="lower batch_size") as caught:
        bench.case().run()
    assert caught.value.error.code == "out_of_memory"


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_a_library_could_not_get_is_memory_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def step(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("trainers.training.recipe.training_step", step)
    with pytest.raises(CapacityError) as caught:
        bench.case().run()
    assert caught.value.error.code == "out_of_memory"


def test_other_errors_are_left_as_they_are(bench: Bench) -> None:
    class Broken(Recorder):
        def started(self, total_steps: int, device: str) -> None:
            raise RuntimeError("the log is gone")

    with pytest.raises(RuntimeError, match="the log is gone"):
        bench.case().run(Broken())


def test_the_log_tells_what_is_trained_how_far_it_is_and_what_has_no_effect(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="tunewright.train"):
        bench.case("full", fsdp_cpu_offload=True, memory_efficient_fsdp_wrap=True, log_every_n_steps=11).run()
    lines = [record.getMessage() for record in caplog.records if record.name == "tunewright.train"]
    assert lines[0] == "tiny: llama, 106,816 parameters, 106,816 trained (full)"
    assert lines[1] == "1 worker on cpu, fp32 | 22 steps in 2 epochs, 0 of them warm-up"
    assert any(line.startswith("fsdp_cpu_offload has no effect") for line in lines)
    assert any(line.startswith("memory_efficient_fsdp_wrap has no effect") for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(" | ")[:2] for line in steps] == [["step 11/22", "epoch 1/2"], ["step 22/22", "epoch 2/2"]]


@pytest.mark.parametrize(("warmup", "warned"), [(21, False), (22, True), (100_000, True)])
def test_the_log_says_that_a_warm_up_is_as_long_as_the_run_and_what_to_do(
    bench: Bench, caplog: pytest.LogCaptureFixture, warmup: int, warned: bool
) -> None:
    cosine = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
    scheduler = ComponentSpec(component=cosine, kwargs={"num_warmup_steps": warmup})
    caplog.clear()  # as below
    with caplog.at_level(logging.INFO, logger="tunewright.train"):
        bench.case("full", lr_scheduler=scheduler).run()
    assert f"22 steps in 2 epochs, {min(warmup, 22)} of them warm-up" in caplog.text
    told = f"num_warmup_steps is {warmup:,} and the run has 22 steps: the learning rate never reaches lr; set fewer"
    assert (told in caplog.text) is warned


def test_the_log_of_a_run_that_goes_on_says_after_which_step(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    part = bench.case("full", stop_at=3).run()
    caplog.clear()  # importing torchtune may have set the level of all loggers to INFO
    with caplog.at_level(logging.INFO, logger="tunewright.train"):
        bench.case("full", resume_from=part.checkpoints[-1].path).run()
    (line,) = [message for message in caplog.messages if " worker on " in message]
    assert line.endswith(" | going on after step 3")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_stops_after_any_step_goes_on_as_if_it_had_not(bench: Bench, valid: Path, method: str) -> None:
    """To the bit: the losses, the evaluations, and the weights at the end."""
    lora = LoraSpec(dropout=0.2) if method == "lora" else None
    changes: dict[str, Any] = {"lora": lora, "valid_data": valid, "max_steps_per_epoch": 3}
    whole = bench.case(method, **changes).run()
    for stop_at in range(1, whole.total_steps):
        part = bench.case(method, stop_at=stop_at, **changes).run()
        rest = bench.case(method, resume_from=part.checkpoints[-1].path, **changes).run()
        assert list(part.losses) == list(range(1, stop_at + 1))
        assert part.losses | rest.losses == whole.losses
        evaluations = [(m.step, m.valid_loss) for run in (part, rest) for m in run.evaluations]
        assert evaluations == [(m.step, m.valid_loss) for m in whole.evaluations]
        after, before = (saved_weights(run.checkpoints[-1].path) for run in (rest, whole))
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_wish_to_stop_after_the_last_step_comes_too_late(bench: Bench) -> None:
    recorder = Recorder(stop_at=11)
    bench.case(n_epochs=1).train(recorder)  # which would raise Stopped
    assert [c.step for c in recorder.checkpoints] == [11]

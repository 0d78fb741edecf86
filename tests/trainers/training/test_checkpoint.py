"""Checkpoints: complete once they are visible, exact to resume from, and no larger than necessary."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
from tests.waiting import eventually
from trainers.data.chat import ChatTokenizer
from trainers.errors import InfrastructureError
from trainers.models.adapters import load_peft_adapter, merge_lora
from trainers.models.architecture import inspect_model_dir
from trainers.models.weights import load_weights
from trainers.planning.plan import LoraSpec
from trainers.training.checkpoint import checkpoint_path, load_standing
from trainers.training.reporting import SavedCheckpoint


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(
        make_plan_for(),
        make_tiny_model(tmp_path / "tiny"),
        write_rows(tmp_path / "train", random_rows(21)),
        tmp_path / "run",
        write_rows(tmp_path / "valid", random_rows(5, seed=1)),
    )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("stop_at", "dtype"), [(4, "fp32"), (11, "fp32"), (15, "fp32"), (4, "bf16"), (4, "mixed")])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(case: Case, method: str, stop_at: int, dtype: str) -> None:
    lora = LoraSpec(dropout=0.2) if method == "lora" else None
    case = replace(case, plan=make_plan_for(method, lora=lora, dtype=dtype, clip_grad_norm=1.0))
    if dtype != "fp32":
        store_in_bf16(case.model_dir)
    whole = case.run()
    part = replace(case, output_dir=case.output_dir / "part", stop_at=stop_at).run()
    assert list(part.losses) == list(range(1, stop_at + 1))
    stopped = part.checkpoints[-1].path
    rest = replace(case, output_dir=case.output_dir / "part", resume_from=stopped).run()
    assert part.losses | rest.losses == whole.losses
    assert [m.lr for m in part.steps + rest.steps] == [m.lr for m in whole.steps]
    assert [m.valid_loss for m in part.evaluations + rest.evaluations] == [m.valid_loss for m in whole.evaluations]
    assert rest.total_steps == whole.total_steps
    expected = saved_weights(whole.checkpoints[-1].path)
    for name, tensor in saved_weights(rest.checkpoints[-1].path).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_goes_on_in_the_type_it_began_with_though_another_would_suit_the_machine(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.plan = make_plan_for(dtype=None)
    monkeypatch.setattr("trainers.training.training_model.default_dtype", lambda _: "fp32")
    whole = case.run()
    part = replace(case, output_dir=case.output_dir / "part", stop_at=4).run()
    monkeypatch.setattr("trainers.training.training_model.default_dtype", lambda _: "mixed")
    stopped = part.checkpoints[-1].path
    rest = replace(case, output_dir=case.output_dir / "part", resume_from=stopped).run()
    assert part.losses | rest.losses == whole.losses
    assert load_standing(rest.checkpoints[-1].path).dtype == "fp32"
    assert case.run().losses != whole.losses


def test_checkpoints_come_every_n_steps_and_epoch_but_once_a_step(case: Case) -> None:
    run = replace(case, plan=make_plan_for(save_every_n_steps=11)).run()
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(11, 1), (22, 2)]
    run = replace(case, plan=make_plan_for(save_every_n_steps=4)).run()
    assert [c.step for c in run.checkpoints] == [4, 8, 11, 12, 16, 20, 22]
    losses, evaluations = run.losses, {m.step: m.valid_loss for m in run.evaluations}
    for saved in run.checkpoints:
        assert saved.metrics["loss"] == losses[saved.step]
        assert saved.metrics.get("valid_loss") == evaluations.get(saved.step)


class Slow(Recorder):
    """The first checkpoint takes so long that two more steps are done meanwhile."""

    def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
        if not self.checkpoints:
            eventually(lambda: len(self.steps) >= checkpoint.step + 2, 60, lambda: "no step is done meanwhile")
            self.ahead = len(self.steps) - checkpoint.step
        super().checkpoint(checkpoint)


def test_adapters_train_on_while_a_checkpoint_is_written_and_it_holds_the_step_it_names(case: Case) -> None:
    case.plan = make_plan_for(save_every_n_steps=4, n_epochs=1)
    reporter = Slow()
    case.run(reporter)
    assert reporter.ahead >= 2
    assert [c.step for c in reporter.checkpoints] == [4, 8, 11]
    stopped = replace(case, output_dir=case.output_dir / "stopped", stop_at=4).run()
    expected = saved_weights(stopped.checkpoints[-1].path)
    for name, tensor in saved_weights(reporter.checkpoints[0].path).items():
        assert torch.equal(tensor, expected[name]), name


def test_full_fine_tuning_on_the_cpu_keeps_no_second_copy_and_waits(case: Case) -> None:
    case.plan = make_plan_for("full", save_every_n_steps=4, n_epochs=1)
    seen: list[int] = []

    class Watching(Recorder):
        def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
            seen.append(self.steps[-1].step)
            super().checkpoint(checkpoint)

    case.run(Watching())
    assert seen == [4, 8, 11]


def test_older_checkpoints_than_the_last_n_are_deleted_and_the_best_one_stays(case: Case) -> None:
    rising: dict[str, Any] = {"lr": 1.0, "lr_scheduler": None}  # far too high: the first epoch is the best
    case.plan = make_plan_for(n_epochs=4, save_every_n_steps=6, keep_last_n_checkpoints=2, **rising)
    run = case.run()
    losses = {m.step: known(m.valid_loss) for m in run.evaluations if m.step}
    best = min(losses, key=lambda step: losses[step])
    assert [c.step for c in run.checkpoints if c.best] == [
        step for step in losses if losses[step] == min(losses[s] for s in losses if s <= step)
    ]
    left = sorted(path.name for path in (case.output_dir / "checkpoints").iterdir())
    assert left == sorted({checkpoint_path(case.output_dir, step).name for step in (best, 42, 44)})
    assert {path.name for path in run.gone} == {c.path.name for c in run.checkpoints} - set(left)


def test_early_stopping_ends_the_run_when_validation_gets_no_better(case: Case) -> None:
    case.plan = make_plan_for(n_epochs=6, early_stopping_patience=2, lr=1e-30)  # so low that nothing is learnt
    run = case.run()
    assert [(c.epoch, c.best) for c in run.checkpoints] == [(1, True), (2, False), (3, False)]
    # A run that was interrupted meanwhile knows what was seen before.
    part = replace(case, output_dir=case.output_dir / "part", stop_at=25).run()
    rest = replace(case, output_dir=case.output_dir / "part", resume_from=part.checkpoints[-1].path).run()
    assert [c.epoch for c in rest.checkpoints] == [3]
    # One that was interrupted after it had stopped trains no further.
    again = replace(case, output_dir=case.output_dir / "again", resume_from=run.checkpoints[-1].path).run()
    assert (again.steps, again.checkpoints) == ([], [])


def test_evaluations_within_an_epoch_find_the_best_checkpoint_and_it_stays(case: Case) -> None:
    # An epoch begins with rows like the validation data, and goes on with others, of which the model gets worse.
    unlike = [([7] * 12, [False] * 2 + [True] * 10)] * 11
    case.train_data = write_rows(case.output_dir.parent / "turning", random_rows(5, seed=1) * 2 + unlike)
    case.plan = make_plan_for(
        n_epochs=2, run_val_every_n_steps=2, keep_last_n_checkpoints=1, lr=0.03, lr_scheduler=None
    )
    run = case.run()
    losses = {m.step: m.valid_loss for m in run.evaluations}
    assert list(losses) == [0, 2, 4, 6, 8, 10, 11, 12, 14, 16, 18, 20, 22]
    assert [m.epoch for m in run.evaluations] == [0, *[1] * 6, *[2] * 6]
    del losses[0]
    best = [step for step in losses if losses[step] == min(losses[s] or 0 for s in losses if s <= step)]
    assert best[-1] % 11, "the best is at the end of an epoch, so this tests nothing"
    assert [c.step for c in run.checkpoints if c.best] == best
    assert [c.step for c in run.checkpoints] == sorted({*best, 11, 22})
    assert all(c.metrics["valid_loss"] == losses[c.step] for c in run.checkpoints)
    left = sorted(path.name for path in (case.output_dir / "checkpoints").iterdir())
    assert left == [checkpoint_path(case.output_dir, step).name for step in (best[-1], 22)]


def test_early_stopping_within_an_epoch_counts_evaluations_across_an_interruption(case: Case) -> None:
    still: dict[str, Any] = {"lr": 1e-30, "early_stopping_patience": 3, "run_val_every_n_steps": 2}  # nothing is learnt
    case.plan = make_plan_for(n_epochs=6, **still)
    run = case.run()
    assert [(c.step, c.best) for c in run.checkpoints] == [(2, True), (8, False)]
    assert list(run.losses) == list(range(1, 9))
    for stop_at in (2, 3, 6):
        part_case = replace(case, output_dir=case.output_dir / f"part{stop_at}")
        part = replace(part_case, stop_at=stop_at).run()
        rest = replace(part_case, resume_from=part.checkpoints[-1].path).run()
        assert part.losses | rest.losses == run.losses
        assert [m.step for m in part.evaluations + rest.evaluations] == [0, 2, 4, 6, 8]
        assert rest.checkpoints[-1].step == 8


def test_only_the_newest_checkpoint_keeps_its_training_state(case: Case) -> None:
    run = case.run()
    assert [(c.path / "training_state").exists() for c in run.checkpoints] == [False, True]
    assert sorted(p.name for p in run.checkpoints[0].path.iterdir()) == ["adapter", "merged"]


def test_the_older_training_state_stays_until_the_newer_checkpoint_is_recorded(case: Case) -> None:
    class Crashing(Recorder):
        def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
            if self.checkpoints:
                raise ConnectionError("crash before the second checkpoint is recorded")
            super().checkpoint(checkpoint)

    reporter = Crashing()
    with pytest.raises(ConnectionError):
        case.run(reporter)
    first = reporter.checkpoints[0].path
    assert load_standing(first).progress.step == 11
    again = replace(case, resume_from=first).run()
    assert [c.step for c in again.checkpoints] == [22]


def test_a_crash_while_writing_leaves_no_checkpoint_and_the_next_run_clears_up(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainers.training.checkpoint._save_state", full_disk)
        with pytest.raises(OSError, match="No space left"):
            case.run()
    folder = case.output_dir / "checkpoints"
    assert list(folder.iterdir()) == []
    draft = folder / ".step-00000011.draft"  # what a killed process leaves behind
    draft.mkdir()
    case.run()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000011", "step-00000022"]


def test_a_later_attempt_writes_under_names_of_its_own_and_clears_up_what_nobody_recorded(case: Case) -> None:
    case.plan = make_plan_for(n_epochs=2, save_every_n_steps=4)

    class Dying(Recorder):
        def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
            if checkpoint.step > 8:
                raise ConnectionError("the runner died before this checkpoint was recorded")
            super().checkpoint(checkpoint)

    first = Dying()
    with pytest.raises(ConnectionError):
        case.run(first)
    recorded = [checkpoint.path for checkpoint in first.checkpoints]
    unrecorded = checkpoint_path(case.output_dir, 11)
    assert load_standing(recorded[-1]).progress.step == 8
    assert unrecorded.is_dir()
    again = replace(case, resume_from=recorded[-1], attempt=2).run()
    assert [c.path.name for c in again.checkpoints[:2]] == ["step-00000011-attempt-2", "step-00000012-attempt-2"]
    left = set((case.output_dir / "checkpoints").iterdir())
    assert left == {*recorded, *(checkpoint.path for checkpoint in again.checkpoints)}


def test_an_attempt_that_was_replaced_touches_nothing_of_the_one_that_replaced_it(case: Case) -> None:
    """It goes on writing checkpoints after another attempt has taken over."""
    case.plan = make_plan_for(n_epochs=1, save_every_n_steps=4, keep_last_n_checkpoints=1)
    folder = case.output_dir / "checkpoints"
    theirs = {"step-00000004-attempt-2", ".step-00000008-attempt-2.draft", "step-00000012-attempt-10"}
    for name in theirs:
        (folder / name / "training_state").mkdir(parents=True)
    case.run()
    assert {path.name for path in folder.iterdir()} == theirs | {"step-00000011"}
    assert all((folder / name / "training_state").is_dir() for name in theirs)


def test_later_checkpoints_that_the_log_lost_do_not_count_among_the_last_n(case: Case) -> None:
    """An older event log was restored, so the attempt is repeated, in the directory of the lost one."""
    case.plan = make_plan_for(n_epochs=1, save_every_n_steps=4, keep_last_n_checkpoints=1)
    case.valid_data = None
    for step in (9, 10):
        (checkpoint_path(case.output_dir, step) / "training_state").mkdir(parents=True)
    run = replace(case, stop_at=5).run()
    assert [checkpoint.step for checkpoint in run.checkpoints] == [4, 5]
    assert run.gone == [checkpoint_path(case.output_dir, 4)]
    assert load_standing(run.checkpoints[-1].path).progress.step == 5


def test_an_attempt_that_had_to_begin_further_back_keeps_its_own_last_checkpoints(case: Case) -> None:
    case.plan = make_plan_for(n_epochs=1, save_every_n_steps=4, keep_last_n_checkpoints=1)
    case.valid_data = None
    first = replace(case, stop_at=8).run().checkpoints[-1].path
    shutil.rmtree(first / "training_state")  # somebody was short of room: nothing is left to go on from
    again = replace(case, stop_at=5, attempt=2).run()
    assert again.gone == [first, checkpoint_path(case.output_dir, 4, attempt=2)]
    assert load_standing(again.checkpoints[-1].path).progress.step == 5


def test_a_checkpoint_that_somebody_reads_while_it_is_deleted_ends_no_run(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system keeps an open file, and so its directory."""
    case.plan = make_plan_for(n_epochs=2, save_every_n_steps=4, keep_last_n_checkpoints=1)
    case.valid_data = None
    reading, rmdir = True, os.rmdir

    def while_a_file_is_open(path: str, *, dir_fd: int | None = None) -> None:
        if reading and str(path).endswith("step-00000004.old"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        rmdir(path, dir_fd=dir_fd)

    class Reader(Recorder):
        def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
            nonlocal reading
            reading = checkpoint.step < 16
            super().checkpoint(checkpoint)

    monkeypatch.setattr(os, "rmdir", while_a_file_is_open)
    run = case.run(Reader())
    assert [checkpoint.step for checkpoint in run.checkpoints] == [4, 8, 11, 12, 16, 20, 22]
    assert [path.name for path in (case.output_dir / "checkpoints").iterdir()] == ["step-00000022"]


def test_checkpoints_are_deleted_in_the_order_of_their_steps_and_attempts(case: Case) -> None:
    case.plan = make_plan_for(n_epochs=1, save_every_n_steps=4, keep_last_n_checkpoints=2)
    case.valid_data = None
    first = replace(case, stop_at=4).run().checkpoints[-1].path
    again = replace(case, resume_from=first, attempt=2).run()
    assert again.gone == [first]


def test_full_fine_tuning_saves_a_model_directory(case: Case) -> None:
    path = replace(case, plan=make_plan_for("full")).run().checkpoints[-1].path
    arch = inspect_model_dir(path)
    assert load_weights(path, arch).keys() == load_weights(case.model_dir, arch).keys()
    assert not torch.equal(load_weights(path, arch)["norm.scale"], load_weights(case.model_dir, arch)["norm.scale"])


def test_lora_saves_the_merged_model_and_the_adapter_apart(case: Case) -> None:
    path = case.run().checkpoints[-1].path
    arch = inspect_model_dir(path / "merged")
    adapter = load_peft_adapter(path / "adapter", arch, LoraSpec())
    assert any(tensor.any() for name, tensor in adapter.items() if ".lora_b." in name)
    expected = merge_lora(load_weights(case.model_dir, arch), adapter, LoraSpec())
    for name, tensor in load_weights(path / "merged", arch).items():
        assert torch.equal(tensor, expected[name]), name
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize(("method", "model"), [("full", "."), ("lora", "merged")])
def test_a_model_without_a_chat_template_is_saved_with_the_one_it_was_trained_with(
    case: Case, method: str, model: str
) -> None:
    config = case.model_dir / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": None}))
    trained_with = ChatTokenizer.from_dir(case.model_dir)
    assert not trained_with.has_own_template
    path = replace(case, plan=make_plan_for(method, n_epochs=1)).run().checkpoints[-1].path / model
    file = path / "chat_template.jinja"
    assert file.read_text() == trained_with.template
    assert file.stat().st_mode & 0o777 == 0o644
    dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert ChatTokenizer.from_dir(path).render(dialog) == trained_with.render(dialog)


def test_a_model_s_own_chat_template_is_saved_as_it_came(case: Case) -> None:
    merged = case.run().checkpoints[-1].path / "merged"
    assert not (merged / "chat_template.jinja").exists()
    assert ChatTokenizer.from_dir(merged).template == ChatTokenizer.from_dir(case.model_dir).template


def test_a_checkpoint_holds_safetensors_and_text_only(case: Case) -> None:
    case.run()
    files = [path for path in (case.output_dir / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    state = load_file(checkpoint_path(case.output_dir, 22) / "training_state" / "optimizer.safetensors")
    assert {name.partition("/")[0] for name in state} == {"exp_avg", "exp_avg_sq", "step"}


def test_a_checkpoint_without_training_state_is_refused_by_name(case: Case) -> None:
    first = case.run().checkpoints[0].path
    with pytest.raises(InfrastructureError, match=str(first)) as caught:
        replace(case, resume_from=first).run()
    assert caught.value.error.code == "checkpoint_unreadable"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda content: content[: len(content) // 2],
    "overwritten": lambda content: content[:8] + bytes([0xFF] * 8) + content[16:],
    "empty": lambda _: b"",
}


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ("lora", "training_state/state.json"),
        ("lora", "training_state/optimizer.safetensors"),
        ("lora", "adapter/adapter_model.safetensors"),
        ("lora", "adapter/adapter_config.json"),
        ("full", "model.safetensors"),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named(case: Case, method: str, file: str) -> None:
    part = replace(case, plan=make_plan_for(method), stop_at=4).run()
    resumed = replace(case, plan=make_plan_for(method), resume_from=part.checkpoints[-1].path)
    damaged = known(resumed.resume_from) / file
    whole = damaged.read_bytes()
    for damage in DAMAGES.values():
        damaged.write_bytes(damage(whole))
        with pytest.raises(InfrastructureError, match=re.escape(str(damaged))) as caught:
            resumed.run()
        assert caught.value.error.code == "checkpoint_unreadable"
        assert "resubmit it from an earlier checkpoint" in known(caught.value.error.suggestion)


def test_a_disk_that_is_away_is_not_taken_for_a_damaged_checkpoint(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trainers.running.fit` interrupts the job on such an error, and resumes it later."""
    part = replace(case, stop_at=4).run()

    def away(*_: object, **__: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", away)
    with pytest.raises(OSError, match="Input/output error"):
        load_standing(part.checkpoints[-1].path)


def test_resuming_a_run_that_has_ended_does_nothing(case: Case) -> None:
    last = case.run().checkpoints[-1].path
    again = replace(case, resume_from=last).run()
    assert (again.steps, again.checkpoints, again.total_steps) == ([], [], 22)

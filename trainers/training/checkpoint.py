"""Checkpoints: the trained model in a form that loads anywhere, and the state from which a run resumes exactly.

`checkpoints/step-00000040/` is a Hugging Face model directory (full) or holds `merged/` and `adapter/` (LoRA). Its
`training_state/`, with the optimizer state and the position in the data, is deleted when a newer checkpoint has been
recorded. A checkpoint is written under a hidden temporary name, flushed to disk and renamed: a directory with its final
name is complete, and a crash leaves earlier checkpoints as they were. Tensors are stored as safetensors only.

Each attempt of a job after the first has its own names, `step-00000060-attempt-2`, and no attempt touches the
checkpoints of a later one. So a process that has been replaced, but doesn't know it yet, does no harm.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from events.disk import sync_path, sync_tree
from trainers.errors import InfrastructureError, UserError, storage_away
from trainers.methods import Method
from trainers.models.architecture import Architecture
from trainers.planning.precision import Dtype
from trainers.training.batches import Progress
from trainers.training.distributed import Ranks, gathered
from trainers.training.optimization import optimizer_state, restore_optimizer_state
from trainers.training.reporting import Reporter, SavedCheckpoint

STATE = "training_state"
LOOK_S = 60.0
"""Seconds. While rank 0 writes, it exchanges a sum with the other ranks this often: a collective call that takes 30
minutes fails."""
_log = logging.getLogger("tunewright.train")

NamedParameters = Mapping[str, nn.Parameter]


_NAME = re.compile(r"\.?step-(\d{8,})(?:-attempt-(\d+))?(\.draft|\.old)?")


def checkpoint_path(output_dir: Path, step: int, attempt: int = 1) -> Path:
    suffix = f"-attempt-{attempt}" if attempt > 1 else ""
    return output_dir / "checkpoints" / f"step-{step:08d}{suffix}"


@dataclass(frozen=True)
class Validation:
    """The results of the evaluations so far: the lowest loss, the step after which it was measured (0: none yet), and
    the number of evaluations since."""

    best_loss: float = math.inf
    best_step: int = 0
    without_gain: int = 0

    def after(self, step: int, loss: float) -> "Validation":
        """With the evaluation after `step`, whose loss is `loss`."""
        if loss < self.best_loss:
            return Validation(loss, step)
        return replace(self, without_gain=self.without_gain + 1)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on. A context manager: on exit it
    waits for the checkpoint that is being written, and raises its error unless another one is already being raised.

    In full fine-tuning and QAT on a CPU, training waits for each checkpoint: otherwise it would need a copy of the
    weights, the largest thing in memory.
    """

    def __init__(
        self,
        output_dir: Path,
        method: Method,
        arch: Architecture,
        model_dir: Path,
        dtype: Dtype,
        ranks: Ranks,
        reporter: Reporter,
        attempt: int,
        resumed_step: int,
    ) -> None:
        self._output_dir = output_dir
        self._attempt = attempt
        self._resumed_step = resumed_step
        self._method = method
        self._arch = arch
        self._model_dir = model_dir
        self._dtype = dtype
        self._ranks = ranks
        self._reporter = reporter
        self._keep_last_n = method.plan.keep_last_n_checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise
            _log.exception("the last checkpoint could not be written")
        finally:
            self._thread.shutdown()

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk and reported. Raises the error of its writing."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def save(
        self,
        progress: Progress,
        validation: Validation,
        metrics: Mapping[str, float],
        parameters: NamedParameters,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Saves the checkpoint of `progress`, with the latest `metrics`. Every rank has to call it. Rank 0 writes it,
        and then deletes older ones as `keep_last_n_checkpoints` says.

        `parameters` are the trained ones. They may change again once this returns.
        """
        self._wait_together()
        writes_later = self._method.keeps_base or self._ranks.device.type != "cpu"
        weights = _gathered(dict(parameters), self._ranks, copy=writes_later)
        moments = _gathered(dict(_optimizer_tensors(parameters, optimizer)), self._ranks, copy=writes_later)
        if self._ranks.first:
            self._under_way = self._thread.submit(self._write, progress, validation, dict(metrics), weights, moments)
        if not writes_later:
            self._wait_together()

    def _wait_together(self) -> None:
        """`wait` on every rank, in several collective calls: a slow disk may take longer than one is allowed to."""
        while self._ranks.sum([self._still_writing()])[0]:
            pass
        self.wait()

    def _still_writing(self) -> bool:
        """Waits for `LOOK_S` at most; whether a checkpoint is still being written then."""
        return self._under_way is not None and bool(wait([self._under_way], LOOK_S).not_done)

    def _write(
        self,
        progress: Progress,
        validation: Validation,
        metrics: dict[str, float],
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
    ) -> None:
        path = checkpoint_path(self._output_dir, progress.step, self._attempt)
        with _appearing(path) as draft:
            self._method.save(draft, weights, self._arch, self._model_dir)
            _save_state(draft / STATE, moments, Standing(progress, validation, self._dtype))
        best = progress.step == validation.best_step
        _log.info("checkpoint %s%s", path, " (the best so far)" if best else "")
        self._reporter.checkpoint(SavedCheckpoint(path, progress.step, progress.epoch, metrics, best))
        tidy(self._output_dir, progress.step, self._attempt, self._resumed_step)
        if self._keep_last_n is not None:
            self._delete_all_but(self._keep_last_n, progress.step, validation.best_step)

    def _delete_all_but(self, last_n: int, step: int, best_step: int) -> None:
        """Of the checkpoints up to that of `step`, deletes all but the last `last_n` and the best. (Later ones of this
        attempt were recorded in an event log that was lost since.) Reports it first: a listed checkpoint exists."""
        entries = _entries(self._output_dir, self._attempt)
        written = [entry for entry in entries if not entry.hidden and entry[:2] <= (self._attempt, step)]
        doomed = [entry.path for entry in written[:-last_n] if entry.step != best_step]
        if doomed:
            self._reporter.deleted(doomed)
        for path in doomed:
            _remove(path)


class Standing(NamedTuple):
    """The state of a run besides weights and optimizer. `dtype` is the one it trains in; None at the start, and in
    checkpoints of early versions."""

    progress: Progress = Progress()
    validation: Validation = Validation()
    dtype: Dtype | None = None


def load_standing(checkpoint: Path) -> Standing:
    """The state of the run at `checkpoint`. Raises InfrastructureError `checkpoint_unreadable`."""
    file = checkpoint / STATE / "state.json"
    with reading(file):
        state = json.loads(file.read_text(encoding="utf-8"))
        return Standing(Progress(**state["progress"]), Validation(**state.get("validation", {})), state.get("dtype"))


def load_optimizer(checkpoint: Path, parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> None:
    """Restores the optimizer's state from `checkpoint`, which a run with any number of ranks may have saved. Every rank
    has to call it. Raises InfrastructureError `checkpoint_unreadable`."""
    path = checkpoint / STATE / "optimizer.safetensors"
    with reading(path):
        opened = safe_open(path, framework="pt")
    with opened as file:
        keys: dict[str, list[str]] = {}
        for key in file.keys():  # noqa: SIM118  -- not a dict
            attribute, _, name = key.partition("/")
            keys.setdefault(name, []).append(attribute)
        for name, attributes in keys.items():
            with reading(path):
                parameter = parameters[name]
                saved = {attribute: file.get_tensor(f"{attribute}/{name}") for attribute in attributes}
            restore_optimizer_state(optimizer, parameter, saved)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """To read a file or directory of the checkpoint to resume from: turns errors that say it is damaged into
    InfrastructureError `checkpoint_unreadable`. Lets errors of a disk that doesn't work just now pass: they interrupt
    the job, which resumes later."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, UserError) as error:
        if storage_away(error):
            raise
        # A UserError is `model_incomplete`, and names its file.
        reason = error.error.message if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}"
        raise InfrastructureError(
            "checkpoint_unreadable",
            f"the checkpoint to resume from is damaged or can't be read: {reason.removesuffix('.')}.",
            suggestion="submit the job again, or resubmit it from an earlier checkpoint",
        ) from None


class _Entry(NamedTuple):
    """An entry of a job's checkpoints directory: a checkpoint, or (`hidden`) a draft or one that is being deleted."""

    attempt: int
    step: int
    hidden: bool
    path: Path


def _entries(output_dir: Path, attempt: int) -> list[_Entry]:
    """The entries of this attempt and of those before it, in the order they were written: by attempt, then by step. (An
    attempt may begin at an earlier step than the one before it had reached.)"""
    entries = (
        _Entry(int(name[2] or 1), int(name[1]), path.name.startswith("."), path)
        for path in (output_dir / "checkpoints").iterdir()
        if (name := _NAME.fullmatch(path.name)) is not None
    )
    return sorted(entry for entry in entries if entry.attempt <= attempt)


def tidy(output_dir: Path, step: int, attempt: int, resumed_step: int) -> None:
    """Deletes what is not needed any more once the checkpoint of `step` is recorded: the training states of the
    checkpoints before it, drafts of runs that crashed, and unrecorded checkpoints of earlier attempts. Those are the
    ones beyond `resumed_step`: had they been recorded, this attempt would have resumed from them."""
    for entry in _entries(output_dir, attempt):
        if entry.hidden:
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.attempt < attempt and entry.step > resumed_step and (entry.path / STATE).is_dir():
            _remove(entry.path)
        elif entry.step < step:
            shutil.rmtree(entry.path / STATE, ignore_errors=True)


def _remove(path: Path) -> None:
    """Renames a checkpoint to a hidden name, as a directory with its final name is complete, and deletes it. What can't
    be deleted yet (a network file system keeps a file that is being read) is left to a later `tidy`."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")), ignore_errors=True)


def _gathered(tensors: Mapping[str, Tensor], ranks: Ranks, *, copy: bool) -> dict[str, Tensor]:
    """The full tensors on rank 0, gathered one by one; nothing on the other ranks. `copy`: not sharing memory with
    `tensors`."""
    full = {}
    for name, tensor in tensors.items():
        value = gathered(tensor, ranks)
        if value is not None:
            shared = copy and not isinstance(tensor, DTensor) and tensor.device.type == "cpu"
            full[name] = value.clone() if shared else value
    return full


def _optimizer_tensors(parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state, as `exp_avg/layers.0.attn.q_proj.weight` and so on."""
    for name, parameter in parameters.items():
        for attribute, value in optimizer_state(optimizer, parameter).items():
            yield f"{attribute}/{name}", value


def _save_state(state_dir: Path, moments: dict[str, Tensor], standing: Standing) -> None:
    state_dir.mkdir()
    save_file(moments, state_dir / "optimizer.safetensors")
    state: dict[str, Any] = {"progress": asdict(standing.progress), "dtype": standing.dtype}
    if standing.validation.best_step:
        state["validation"] = asdict(standing.validation)
    (state_dir / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary directory to write into. When the block ends without an error, it is flushed to disk and renamed to
    `path`, in the place of an older `path` (of a run that has since resumed from an earlier checkpoint)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_tree(draft)
    if path.exists():
        old = path.parent / f".{path.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    draft.rename(path)
    sync_path(path.parent)

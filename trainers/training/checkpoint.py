"""Checkpoints: models that load anywhere, complete as soon as they can be seen, and what a run needs to go on exactly.

`checkpoints/step-00000040/` is a Hugging Face model directory (full) or holds `merged/` and `adapter/` (LoRA). Its
`training_state/` stays until a newer checkpoint is recorded. Everything is written under a hidden temporary name,
flushed to disk and renamed; a crash leaves the earlier checkpoints as they were. Only safetensors and JSON.

Each attempt after the first writes under names of its own, `step-00000060-attempt-2`, and nothing touches what a later
attempt has written: a process that was replaced and does not know it yet can do no harm.
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
"""While rank 0 writes, the others hear from it as often: torch.distributed gives up on who is silent for 30 minutes."""
_log = logging.getLogger("tunewright.train")

NamedParameters = Mapping[str, nn.Parameter]


_NAME = re.compile(r"\.?step-(\d{8,})(?:-attempt-(\d+))?(\.draft|\.old)?")


def checkpoint_path(output_dir: Path, step: int, attempt: int = 1) -> Path:
    suffix = f"-attempt-{attempt}" if attempt > 1 else ""
    return output_dir / "checkpoints" / f"step-{step:08d}{suffix}"


@dataclass(frozen=True)
class Validation:
    """What the evaluations have shown: the lowest loss, the step it was seen after (0: none yet), and
    how many evaluations there have been since."""

    best_loss: float = math.inf
    best_step: int = 0
    without_gain: int = 0

    def after(self, step: int, loss: float) -> "Validation":
        if loss < self.best_loss:
            return Validation(loss, step)
        return replace(self, without_gain=self.without_gain + 1)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, while training goes on. A context: what is under way when it ends is
    finished and reported; it raises what went wrong in writing, unless something else is being raised.

    Trained weights that are many and lie in host memory already are the exception: a second copy of them would be the
    largest thing there, so training waits until they are written.
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
        """Returns once the last checkpoint is on disk and reported. Raises what went wrong."""
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
        """The checkpoint of `progress`, with the `metrics` of its moment. Every rank has to call it; rank 0 writes, and
        then deletes what is not to be kept.

        `parameters` are the trained ones, which may change again when it returns.
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
        """`wait`, of every rank. A disk may take longer than the others can stand in one collective call."""
        while self._ranks.sum([self._still_writing()])[0]:
            pass
        self.wait()

    def _still_writing(self) -> bool:
        """Whether it still is after at most `LOOK_S`."""
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
        """Of those up to the one of `step`: what this attempt has beyond it is of an event log that was lost. Reported
        before they are gone: a checkpoint that is listed is there."""
        entries = _entries(self._output_dir, self._attempt)
        written = [entry for entry in entries if not entry.hidden and entry[:2] <= (self._attempt, step)]
        doomed = [entry.path for entry in written[:-last_n] if entry.step != best_step]
        if doomed:
            self._reporter.deleted(doomed)
        for path in doomed:
            _remove(path)


class Standing(NamedTuple):
    """Where a run stands. `dtype`: what it trains in (None: nothing was trained, or the checkpoint doesn't say)."""

    progress: Progress = Progress()
    validation: Validation = Validation()
    dtype: Dtype | None = None


def load_standing(checkpoint: Path) -> Standing:
    """Where the run stood at `checkpoint`. Raises InfrastructureError `checkpoint_unreadable`."""
    file = checkpoint / STATE / "state.json"
    with reading(file):
        state = json.loads(file.read_text(encoding="utf-8"))
        return Standing(Progress(**state["progress"]), Validation(**state.get("validation", {})), state.get("dtype"))


def load_optimizer(checkpoint: Path, parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer the state it had. Every rank has to call it; any number of ranks may have saved it.
    Raises InfrastructureError `checkpoint_unreadable`."""
    path = checkpoint / STATE / "optimizer.safetensors"
    with reading(path), safe_open(path, framework="pt") as file:
        keys: dict[str, list[str]] = {}
        for key in file.keys():  # noqa: SIM118  -- not a dict
            attribute, _, name = key.partition("/")
            keys.setdefault(name, []).append(attribute)
        for name, attributes in keys.items():
            saved = {attribute: file.get_tensor(f"{attribute}/{name}") for attribute in attributes}
            restore_optimizer_state(optimizer, parameters[name], saved)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """For reading a file or directory of the checkpoint that a run resumes from: turns errors that say it is damaged
    into InfrastructureError `checkpoint_unreadable`. An OSError of a disk that doesn't work just now passes: it
    interrupts the job, which resumes later."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, UserError) as error:
        if storage_away(error):
            raise
        # A UserError is `model_incomplete`, and names its file.
        reason = error.error.message if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}"
        raise InfrastructureError(
            "checkpoint_unreadable",
            f"can't resume, as the checkpoint is damaged: {reason.removesuffix('.')}.",
            suggestion="submit the job again, or resubmit it from an earlier checkpoint",
        ) from None


class _Entry(NamedTuple):
    """Something in a job's directory of checkpoints: one (`hidden` False), a draft, or one that is being deleted."""

    attempt: int
    step: int
    hidden: bool
    path: Path


def _entries(output_dir: Path, attempt: int) -> list[_Entry]:
    """What this attempt and those before it have written, the last one at the end: an attempt may have gone on from an
    earlier step than the one before it had come to."""
    entries = (
        _Entry(int(name[2] or 1), int(name[1]), path.name.startswith("."), path)
        for path in (output_dir / "checkpoints").iterdir()
        if (name := _NAME.fullmatch(path.name)) is not None
    )
    return sorted(entry for entry in entries if entry.attempt <= attempt)


def tidy(output_dir: Path, step: int, attempt: int, resumed_step: int) -> None:
    """To be called once the checkpoint of `step` is recorded. Deletes what only resuming needs from the checkpoints
    before it, the drafts of runs that crashed, and checkpoints of earlier attempts that nobody recorded: those this
    attempt could have gone on from, had they been."""
    for entry in _entries(output_dir, attempt):
        if entry.hidden:
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.attempt < attempt and entry.step > resumed_step and (entry.path / STATE).is_dir():
            _remove(entry.path)
        elif entry.step < step:
            shutil.rmtree(entry.path / STATE, ignore_errors=True)


def _remove(path: Path) -> None:
    """Under a hidden name first: what has its final name is complete. What can't be deleted yet (a network file system
    keeps a file that is being read) `tidy` comes across again."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")), ignore_errors=True)


def _gathered(tensors: Mapping[str, Tensor], ranks: Ranks, *, copy: bool) -> dict[str, Tensor]:
    """The full tensors on rank 0, one after the other; nothing on the other ranks. `copy`: in memory of their own."""
    full = {}
    for name, tensor in tensors.items():
        value = gathered(tensor, ranks)
        if value is not None:
            shared = copy and not isinstance(tensor, DTensor) and tensor.device.type == "cpu"
            full[name] = value.clone() if shared else value
    return full


def _optimizer_tensors(parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
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
    """A directory to write into that becomes `path`, flushed to disk, when the block ends without an error.

    An older `path` (a run that went on from an earlier checkpoint comes by again) gives way.
    """
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

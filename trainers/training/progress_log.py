"""The log lines of a run, and its metrics for the reporter. Rank 0 writes them for all ranks."""

import logging
import resource
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from events.facts import StepMetrics
from trainers.models.architecture import Architecture
from trainers.planning.plan import Plan
from trainers.planning.precision import Dtype
from trainers.training.batches import Progress
from trainers.training.checkpoint import Validation
from trainers.training.distributed import Ranks
from trainers.training.optimization import only_warm_up, warmup_steps
from trainers.training.reporting import Reporter
from trainers.training.training_model import TrainingModel, parameter_count

if TYPE_CHECKING:  # it imports this module
    from trainers.training.recipe import Evaluation, StepOutcome

_log = logging.getLogger("tunewright.train")


class ProgressLog:
    """Turns the recipe's steps and evaluations into log lines and StepMetrics. Only rank 0 writes any."""

    def __init__(self, plan: Plan, total_steps: int, reporter: Reporter, ranks: Ranks) -> None:
        self._plan = plan
        self._total_steps = total_steps
        self._reporter = reporter
        self._ranks = ranks
        self._latest: dict[str, float] = {}
        self._began = time.perf_counter()

    def latest(self) -> dict[str, float]:
        """The metrics of the last step, and of an evaluation after it, by their names in StepMetrics."""
        return dict(self._latest)

    def stepped(self, progress: Progress, epoch: int, outcome: "StepOutcome") -> None:
        """Reports a step. `epoch` is the index of its epoch, from 0. The speed is measured since the previous call of
        `stepped` or `restart_clock`."""
        now = time.perf_counter()
        speed, self._began = outcome.tokens / (now - self._began), now
        if not self._ranks.first:
            return
        measured = {
            "loss": outcome.loss,
            "lr": outcome.lr,
            "grad_norm": outcome.grad_norm,
            "tokens": outcome.tokens,
            "tokens_per_second": speed,
            "peak_memory_bytes": _peak_memory(self._ranks.device),
            **outcome.measures,
        }
        self._latest = {name: value for name, value in measured.items() if value is not None}
        if progress.step % self._plan.log_every_n_steps == 0 or progress.step == self._total_steps:
            _log.info(
                "step %d/%d | epoch %d/%d | loss %.4f | lr %.1e | %s tok/s%s",
                *(progress.step, self._total_steps, epoch + 1, self._plan.n_epochs, outcome.loss, outcome.lr),
                f"{speed:,.0f}",
                _rewards(outcome.measures) if self._plan.pairs else "",
            )
        self._reporter.metrics(
            StepMetrics.model_validate({"step": progress.step, "epoch": epoch + 1, "time": _now(), **measured})
        )

    def evaluated(self, progress: Progress, evaluation: "Evaluation") -> None:
        """Reports an evaluation after the step of `progress`."""
        self.restart_clock()
        measured = {"valid_loss": evaluation.loss, "valid_token_accuracy": evaluation.token_accuracy}
        self._latest.update({name: value for name, value in measured.items() if value is not None})
        if self._ranks.first:
            _log.info("validation after step %d/%d | loss %.4f", progress.step, self._total_steps, evaluation.loss)
            epoch = progress.epoch if progress.between_epochs else progress.epoch + 1  # the one under way
            at = {"step": progress.step, "epoch": epoch, "time": _now()}
            self._reporter.metrics(StepMetrics.model_validate(at | measured))

    def stopped_early(self, validation: Validation) -> None:
        if self._ranks.first:
            _log.info(
                "stopped early: no lower validation loss in %s; the lowest, %.4f, was after step %d",
                *(_counted(validation.without_gain, "evaluation"), validation.best_loss, validation.best_step),
            )

    def restart_clock(self) -> None:
        """To be called after an evaluation or a checkpoint, whose time doesn't belong to the next step."""
        self._began = time.perf_counter()


def log_summary(
    plan: Plan,
    arch: Architecture,
    model: TrainingModel,
    dtype: Dtype,
    ranks: Ranks,
    progress: Progress,
    total_steps: int,
) -> None:
    """Logs the model, the workers and the number of steps, and the settings that have no effect here."""
    if not ranks.first:
        return
    trained = parameter_count(model.trainable().values())
    _log.info(
        "%s: %s, %s parameters, %s trained (%s)",
        *(plan.model, arch.family, f"{parameter_count(model.parameters()):,}", f"{trained:,}", plan.method),
    )
    _log.info(
        "%s on %s, %s | %s in %s, %d of them warm-up%s",
        *(_counted(ranks.world, "worker"), ranks.device_name(), dtype),
        *(_counted(total_steps, "step"), _counted(plan.n_epochs, "epoch")),
        min(warmup_steps(plan, total_steps), total_steps),
        f" | going on after step {progress.step}" if progress.step else "",
    )
    if (warning := only_warm_up(plan, total_steps)) is not None:
        _log.warning("%s", warning)
    for line in _no_effect(plan, arch, ranks):
        _log.info("%s", line)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _rewards(measures: dict[str, float]) -> str:
    return "".join(f" | {name.removeprefix('rewards_')} {value:.3f}" for name, value in measures.items())


def _no_effect(plan: Plan, arch: Architecture, ranks: Ranks) -> list[str]:
    lines = []
    if plan.fsdp_cpu_offload and ranks.device.type == "cpu":
        lines.append("fsdp_cpu_offload has no effect: everything is in host memory already")
    elif plan.fsdp_cpu_offload and ranks.world == 1:
        lines.append("fsdp_cpu_offload has no effect with one worker: nothing is sharded")
    if plan.memory_efficient_fsdp_wrap and ranks.world == 1:
        lines.append("memory_efficient_fsdp_wrap has no effect with one worker: nothing is sharded")
    elif plan.memory_efficient_fsdp_wrap and arch.tied:
        lines.append("memory_efficient_fsdp_wrap has no effect: this model's head is tied to its embedding")
    return lines


def _peak_memory(device: torch.device) -> int:
    """Bytes. On the CPU the kernel's high-water mark of this process (VmHWM): getrusage's includes that of the
    process that started it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        marks = (line.split() for line in status.read_text().splitlines())
        return next(int(mark[1]) for mark in marks if mark[0] == "VmHWM:") * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

"""How the recipe reports to its caller while it trains: the Reporter protocol and its values."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from events.facts import StepMetrics


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete on disk. `epoch`: epochs completed. `best`: its validation loss is the lowest so
    far."""

    path: Path
    step: int
    epoch: int
    metrics: dict[str, float] = field(default_factory=dict)
    best: bool = False


class Reporter(Protocol):
    """Given to the recipe by its caller. A method that raises ends the run."""

    def started(self, total_steps: int, device: str) -> None:
        """Called once on every rank, before the first step."""

    def metrics(self, metrics: StepMetrics) -> None:
        """Called on rank 0 for every step and evaluation. Must not block."""

    def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
        """Called on rank 0, in a thread of its own, while training goes on. Must return only once the checkpoint is
        recorded: after that the training states of older checkpoints are deleted."""

    def deleted(self, checkpoints: list[Path]) -> None:
        """Called on rank 0, in the same thread, before it deletes checkpoints. Must return only once that is
        recorded."""

    def should_stop(self) -> bool:
        """Asked on every rank in each step. If one rank says yes, all ranks stop after that step; on CUDA after the
        next one."""


class Stopped(Exception):
    """The run stopped before its last step, as `should_stop` asked. A checkpoint of the step it stopped after has been
    saved and reported."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step

    def __str__(self) -> str:
        return f"stopped after step {self.step}"


class Paused(Exception):
    """The attempt stopped at a checkpoint because the job is being paused."""

"""What the recipe tells the world outside while it trains: the protocol, and the values that pass through it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from events.facts import StepMetrics


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete on disk. `epoch` counts the epochs completed at it; `best`: no evaluation so far
    has shown a lower validation loss than the one at it."""

    path: Path
    step: int
    epoch: int
    metrics: dict[str, float] = field(default_factory=dict)
    best: bool = False


class Reporter(Protocol):
    """Whoever runs the recipe. No method may raise for a reason that is not fatal to the run."""

    def started(self, total_steps: int, device: str) -> None:
        """Every rank calls it, once, before the first step."""

    def metrics(self, metrics: StepMetrics) -> None:
        """Rank 0 calls it for every step and evaluation. Must not block."""

    def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
        """Rank 0 calls it, on a thread of its own, while training goes on. Returns once the checkpoint is recorded:
        older training states are deleted after it."""

    def deleted(self, checkpoints: list[Path]) -> None:
        """Rank 0 calls it, on the same thread, before it deletes them. Returns once that is recorded."""

    def should_stop(self) -> bool:
        """Asked on every rank in each step; one rank's yes stops all of them after the same step. On CUDA that is the
        step after the one it was said in."""


class Stopped(Exception):
    """`should_stop` said yes before the last step; a checkpoint of the step it stopped after was saved and reported."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step

    def __str__(self) -> str:
        return f"stopped after step {self.step}"


class Paused(Exception):
    """The attempt stopped at a checkpoint, because the job is to pause."""

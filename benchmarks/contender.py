"""The task that a contender of the training benchmarks gets, and the recording that it returns, as JSON files.

Nothing here imports torch or this project: the TRL contender runs in an environment of its own.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """One run of one contender. `equal`: all contenders use the settings below. Otherwise each uses its own defaults,
    and only `model_dir`, the data and `steps` are taken from here."""

    equal: bool
    method: str
    """full or lora"""
    dtype: str
    """fp32 or bf16; for the defaults it has no effect."""
    model_dir: str
    data_dir: str
    """Prepared data, for our recipe."""
    rows: str
    """The same rows, tokenised, as JSON lines of `input_ids` and `labels`."""
    conversations: str
    """The same rows as `messages`."""
    adapter: str
    """The initial adapter (safetensors, torchtune's names): all LoRA runs with `equal` start from it."""
    output_dir: str
    result: str
    steps: int
    """Optimizer steps. The process exits after the last one."""
    batch_size: int = 4
    """Rows per step, over all workers."""
    lr: float = 2e-5
    weight_decay: float = 0.01
    lora_attn_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "output_proj")
    lora_rank: int = 8
    lora_alpha: int = 16
    exact_loss: bool = False
    """Whether torchtune computes cross-entropy in float64."""

    @classmethod
    def from_argv(cls) -> "Task":
        values = json.loads(Path(sys.argv[1]).read_text())
        return cls(**values | {"lora_attn_modules": tuple(values["lora_attn_modules"])})

    def write(self, file: Path) -> Path:
        file.write_text(json.dumps(asdict(self)))
        return file


@dataclass
class Recording:
    """Records the end of each step. After the last step it writes the result and exits, so saving a model is not
    measured. Times are seconds of the monotonic clock that all processes of a machine share."""

    task: Task
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings of the run, for the notes below the table."""
    steps: list[dict[str, float]] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)
    """When the imports were done (`imported`), and when the model was loaded (`loaded`)."""

    def mark(self, done: str) -> None:
        self.marks[done] = time.perf_counter()

    def step(self, tokens: int, loss: float) -> None:
        """To be called when a step has ended. `tokens`: of its rows, over all workers, without padding."""
        self.steps.append({"at": time.perf_counter(), "tokens": tokens, "loss": loss})
        if len(self.steps) == self.task.steps:
            result = {
                "steps": self.steps,
                "settings": self.settings,
                "marks": self.marks,
                "peak_bytes": peak_bytes(),
            }
            unfinished = Path(self.task.result).with_suffix(".part")
            unfinished.write_text(json.dumps(result))
            unfinished.rename(self.task.result)
            sys.stdout.flush()
            os._exit(0)


def peak_bytes() -> int:
    """The most memory this process has had resident. (getrusage also counts what its parent had when it forked.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

"""One run of our recipe, as a process of its own: `python -m benchmarks.run_ours TASK.json`.

With WORLD_SIZE > 1 (and torchrun's other variables) it is one rank of a gloo group.
"""

import os
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from benchmarks.contender import Recording, Task
from events.config import Config, FineTuningOptions, FullFineTuneOptions, LoraFineTuneOptions
from events.facts import StepMetrics
from trainers.data.dataset import TokenisedDataset
from trainers.models.architecture import inspect_model_dir
from trainers.planning.fitting import recomputing_if_needed
from trainers.planning.plan import ComponentSpec, LoraSpec, Plan, make_plan
from trainers.planning.precision import default_dtype
from trainers.training.recipe import train
from trainers.training.reporting import SavedCheckpoint


class _Recorder:
    """A Reporter that times steps and never stops the run."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def started(self, total_steps: int, device: str) -> None:
        self._recording.mark("loaded")

    def metrics(self, metrics: StepMetrics) -> None:
        assert metrics.tokens is not None
        assert metrics.loss is not None
        self._recording.step(metrics.tokens, metrics.loss)

    def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
        pass

    def deleted(self, checkpoints: list[Path]) -> None:
        pass

    def should_stop(self) -> bool:
        return False


def main() -> None:
    recording = Recording(task := Task.from_argv())
    recording.mark("imported")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    plan = plan_of(task, world)
    recording.settings = _settings(plan)
    train(
        plan,
        model_dir=Path(task.model_dir),
        train_data=Path(task.data_dir),
        valid_data=None,
        output_dir=Path(task.output_dir),
        reporter=_Recorder(recording),
        resume_from=None,
    )


def _settings(plan: Plan) -> dict[str, Any]:
    shown = (
        "batch_size",
        "gradient_accumulation_steps",
        "enable_activation_checkpointing",
        "packed",
        "compile",
    )
    settings = {name: getattr(plan, name) for name in shown}
    settings |= {"dtype": plan.dtype or default_dtype("cpu"), "optimizer": plan.optimizer.component}
    if plan.lora:
        settings |= {"rank": plan.lora.rank, "on": [*plan.lora.attn_modules, *(["mlp"] if plan.lora.mlp else [])]}
    return settings


def plan_of(task: Task, world: int) -> Plan:
    if not task.equal:  # the service's plan for a request without options
        custom = LoraFineTuneOptions() if task.method == "lora" else FullFineTuneOptions()
        options = FineTuningOptions(custom_training_options=custom)
        plan = make_plan(Config(model=task.model_dir, data=task.data_dir, fine_tuning_options=options))
        plan = plan.model_copy(update={"max_steps_per_epoch": task.steps})
        arch, rows = inspect_model_dir(Path(task.model_dir)), TokenisedDataset(Path(task.data_dir))
        share = psutil.virtual_memory().total // (os.cpu_count() or 1)  # of a worker with one CPU
        return recomputing_if_needed(plan, arch, rows.lengths, share)
    lora = LoraSpec(attn_modules=task.lora_attn_modules, rank=task.lora_rank, alpha=task.lora_alpha)
    return Plan.model_validate(
        {
            "model": task.model_dir,
            "data": task.data_dir,
            "method": task.method,
            "lora": lora if task.method == "lora" else None,
            "dtype": task.dtype,
            "batch_size": task.batch_size // world,
            "nproc_per_node": world,
            "lr": task.lr,
            "lr_scheduler": None,
            "optimizer": ComponentSpec(
                component="torch.optim.AdamW", kwargs={"weight_decay": task.weight_decay}
            ),
            "shuffle": False,
            "max_steps_per_epoch": task.steps,
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Runs torchtune's stock recipes: turns a plan of ours into their config, and starts their processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from benchmarks.stock import adapter_config, model_config
from benchmarks.workload import rows_for_others
from tests.waiting import eventually
from trainers.methods import method_of
from trainers.methods.lora import initial_adapter
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder
from trainers.planning.plan import LoraSpec, Plan
from trainers.training.distributed import Ranks
from trainers.training.training_model import COMPUTED_IN, choose_dtype

STEPS_FILE = "steps.json"
ROOT = Path(__file__).parents[2]


class StockStep(NamedTuple):
    loss: float
    next_lr: float  # the recipes log the rate after the schedule's step
    grad_norm: float | None


@dataclass(frozen=True)
class StockRun:
    """One run of the stock recipe `recipe`, with the config.yaml in `directory`."""

    recipe: str
    directory: Path

    @property
    def arguments(self) -> list[str]:
        return [self.recipe, str(self.directory / "config.yaml")]

    @property
    def over(self) -> bool:
        return (self.directory / STEPS_FILE).exists()

    def steps(self) -> list[StockStep]:
        steps = json.loads((self.directory / STEPS_FILE).read_text(encoding="utf-8"))
        assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
        return [StockStep(step["loss"], step["lr"], step.get("grad_norm")) for step in steps]


def prepare_stock_run(plan: Plan, model_dir: Path, data: Path, directory: Path) -> StockRun:
    """Writes the files that the stock recipe needs to train `plan` on the same model and rows to the new
    `directory`."""
    directory.mkdir(parents=True)
    if plan.lora:
        _save_adapter(plan, model_dir, directory)
    config = yaml.safe_dump(_config(plan, model_dir, data, directory))
    (directory / "config.yaml").write_text(config, encoding="utf-8")
    device = "single_device" if plan.workers == 1 else "distributed"
    return StockRun(f"{plan.method}_finetune_{device}", directory)


class StockProcess:
    """Runs stock recipes one after the other, in `workers` processes. Starts at once."""

    def __init__(self, runs: Sequence[StockRun], workers: int, log: Path) -> None:
        self._log = log
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={workers}", "-m"] if workers > 1 else []
        command = [sys.executable, "-m", *torchrun, "tests.parity.stock_launcher"]
        command += [argument for run in runs for argument in run.arguments]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)

    def steps(self, run: StockRun) -> list[StockStep]:
        """Waits until `run` is over. Fails with the end of the output if the process ends before that."""
        eventually(lambda: run.over or self._process.poll() is not None, 900, lambda: "the stock recipe stands still")
        assert run.over, f"the stock recipe failed:\n{self._log.read_text(errors='replace')[-5000:]}"
        return run.steps()

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(60)


def _save_adapter(plan: Plan, model_dir: Path, directory: Path) -> None:
    """Saves our initial adapter and the state of a run that hasn't begun, for the recipe to resume from.

    The A matrices are the same in both libraries. torchtune reorders the rows of q and k by rotated pair, and those of
    their B matrices with them, which ours doesn't; but B is zero.
    """
    arch = inspect_model_dir(model_dir)
    dtype = COMPUTED_IN[choose_dtype(plan, Ranks(0, 1, torch.device("cpu")))]
    with torch.device("meta"):
        decoder = build_decoder(arch, linear=method_of(plan).linear)
    torch.save(initial_adapter(decoder, plan.seed, dtype), directory / "adapter.pt")
    state = {"seed": plan.seed, "epochs_run": 0, "total_epochs": plan.n_epochs, "max_steps_per_epoch": None}
    torch.save(state | {"optimizer": {}, "dataloader": {}}, directory / "recipe_state.pt")


def _config(plan: Plan, model_dir: Path, data: Path, directory: Path) -> dict[str, Any]:
    resumed = {"adapter_checkpoint": "adapter.pt", "recipe_checkpoint": "recipe_state.pt"} if plan.lora else {}
    # Fused, as ours is by default and as in torchtune's own configs.
    fused = {"fused": True} if "Adam" in plan.optimizer.component else {}
    optimizer = {"_component_": plan.optimizer.component, "lr": plan.lr} | fused | plan.optimizer.kwargs
    return {
        "output_dir": str(directory),
        "model": model_config(json.loads((model_dir / "config.json").read_text()), _adapters(plan.lora)),
        "tokenizer": {"_component_": "benchmarks.stock_parts.Padding"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(model_dir),
            "checkpoint_files": ["model.safetensors"],
            "output_dir": str(directory),
            "model_type": "LLAMA3_2",
            **resumed,
        },
        "resume_from_checkpoint": bool(plan.lora),
        "save_adapter_weights_only": True,
        "dataset": {
            "_component_": "benchmarks.stock_parts.rows",
            "file": str(rows_for_others(data)),
            "packed": plan.packed,
            "max_seq_len": plan.max_seq_len,
        },
        "shuffle": plan.shuffle,
        "seed": plan.seed,
        "epochs": plan.n_epochs,
        "max_steps_per_epoch": plan.max_steps_per_epoch,
        "batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "optimizer": optimizer,
        "optimizer_in_bwd": False,
        "lr_scheduler": _lr_scheduler(plan),
        "clip_grad_norm": plan.clip_grad_norm,
        "loss": {"_component_": plan.loss.component} | plan.loss.kwargs,
        "device": "cpu",
        "dtype": plan.dtype,
        "compile": False,
        "enable_activation_checkpointing": plan.enable_activation_checkpointing,
        "enable_activation_offloading": False,
        "metric_logger": {"_component_": "tests.parity.step_log.StepLog", "file": str(directory / STEPS_FILE)},
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
    }


def _lr_scheduler(plan: Plan) -> dict[str, Any] | None:
    if plan.lr_scheduler:
        return {"_component_": plan.lr_scheduler.component} | plan.lr_scheduler.kwargs
    return {"_component_": "benchmarks.stock_parts.constant"} if plan.lora else None


def _adapters(lora: LoraSpec | None) -> dict[str, Any] | None:
    if lora is None:
        return None
    return adapter_config(lora.attn_modules, mlp=lora.mlp, output=lora.output, rank=lora.rank, alpha=lora.alpha)

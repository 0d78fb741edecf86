"""Peak memory of a training worker: the estimate of `trainers.planning.memory` against a measurement.

`python -m benchmarks.training_memory [NAME ...]` runs each of `CASES` on the CPU, with a process for each worker. It
prints a table and exits with 1 if an estimate is off by more than `TOLERANCE`. Linux only.

It measures the growth of resident memory: the high-water mark over the run (VmHWM, with the last checkpoint) minus the
resident memory after all imports, before the model is loaded.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import peak_bytes
from benchmarks.contest import ROOT, as_rank
from events.config import Config
from events.facts import DataReport
from tests.ports import free_ports
from tests.tiny_models import make_tiny_model
from trainers.data.dataset import MASK, MASK_TYPE, OFFSET_TYPE, OFFSETS, REPORT, TOKEN_TYPE, TOKENS, TokenisedDataset
from trainers.models.architecture import inspect_model_dir
from trainers.planning.memory import TOLERANCE, Memory, memory_of
from trainers.planning.plan import make_plan

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
}
"""The shape of SmolLM2-135M."""
ROUND: dict[str, Any] = SMOLLM2 | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Nearly the same shape, but with layers that NF4 can hold: their sizes are multiples of 16,384."""


@dataclass(frozen=True)
class Case:
    """One configuration. `row_tokens`: tokens of each row, the second half of which is trained."""

    options: dict[str, Any]
    custom: dict[str, Any]
    workers: int = 1
    row_tokens: int = 256
    rows: int = 8
    shape: Mapping[str, Any] = field(default_factory=lambda: SMOLLM2)
    stored: str = "bfloat16"
    pairs: bool = False

    def config(self, model: str) -> dict[str, Any]:
        options = {"batch_size": 4, **self.options, "custom_training_options": self.custom}
        overrides = f"--nproc_per_node {self.workers}"
        return {"model": model, "data": "unused", "fine_tuning_options": options, "overrides": overrides}


_FULL = {"finetuning_type": "full", "enable_activation_checkpointing": False}
_LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_alpha": 16}


def _extras(**extras: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"extras": extras}


CASES: dict[str, Case] = {
    "full, fp32": Case(_extras(dtype="fp32"), _FULL),
    "full, fp32, checkpointing": Case(
        _extras(dtype="fp32"), _FULL | {"enable_activation_checkpointing": True}, row_tokens=512
    ),
    "full, fp32, 2 workers": Case(_extras(dtype="fp32"), _FULL, workers=2, rows=16),
    "full, bf16": Case(_extras(dtype="bf16"), _FULL, row_tokens=64),
    "full, mixed": Case(_extras(dtype="mixed"), _FULL),
    "LoRA, fp32": Case(_extras(dtype="fp32"), _LORA),
    "LoRA, fp32, 2 workers": Case(_extras(dtype="fp32"), _LORA, workers=2, rows=16),
    "LoRA, bf16, checkpointing": Case(
        _extras(dtype="bf16", enable_activation_checkpointing=True), _LORA, row_tokens=128
    ),
    "DoRA, fp32": Case(_extras(dtype="fp32", use_dora=True), _LORA),
    "QLoRA, fp32": Case(_extras(dtype="fp32", quantize_base=True), _LORA, shape=ROUND),
    "DPO, LoRA, fp32": Case(
        {"batch_size": 2, **_extras(dtype="fp32", loss={"_component_": "torchtune.rlhf.loss.DPOLoss"})},
        _LORA,
        rows=16,
        pairs=True,
    ),
}


def write_model(case: Case, path: Path) -> Path:
    """Makes a model directory with random weights, in the case's shape and stored dtype."""
    import torch
    from safetensors.torch import load_file

    from trainers.models.export_files import write_safetensors

    make_tiny_model(path, torch_dtype=case.stored, **case.shape)
    file = path / "model.safetensors"
    weights = load_file(file)
    write_safetensors({name: value.to(getattr(torch, case.stored)) for name, value in weights.items()}, file)
    return path


def write_rows(case: Case, path: Path) -> Path:
    """Makes prepared data: the case's `rows` rows of `row_tokens` random tokens."""
    path.mkdir()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, case.shape["vocab_size"], (case.rows, case.row_tokens)).astype(TOKEN_TYPE)
    mask = np.zeros(tokens.shape, MASK_TYPE)
    mask[:, case.row_tokens // 2 :] = 1
    (path / TOKENS).write_bytes(tokens.tobytes())
    (path / MASK).write_bytes(mask.tobytes())
    offsets = np.arange(case.rows + 1, dtype=OFFSET_TYPE) * case.row_tokens
    (path / OFFSETS).write_bytes(offsets.tobytes())
    rows = case.rows // (2 if case.pairs else 1)
    counts = {"rows": rows, "invalid_rows": 0, "truncated_rows": 0, "max_seq_len": case.row_tokens}
    report = DataReport(
        uri="unused",
        tokens=tokens.size,
        trained_tokens=int(mask.sum()),
        length_histogram={str(1 << (case.row_tokens - 1).bit_length()): rows},
        errors=[],
        **counts,
    )
    (path / REPORT).write_text(report.model_dump_json())
    return path


def worker(task: dict[str, Any]) -> None:
    """One worker of a run, in a process of its own. Rank 0 writes the growth of its memory to the task's `result`."""
    import importlib

    import torch
    import torch.distributed as dist

    from trainers.methods import METHODS
    from trainers.training.recipe import train

    plan = make_plan(Config.model_validate(task["config"]))
    importlib.import_module(METHODS[plan.method].rpartition(".")[0])
    if plan.workers > 1:
        import torchtune.training._distributed  # noqa: F401

        dist.init_process_group("gloo")
    torch.autograd.backward(torch.zeros(1).requires_grad_())
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = peak_bytes()
    phases: list[tuple[str, int, dict[str, int]]] = []

    def mark(phase: str) -> None:
        phases.append((phase, peak_bytes() - before, _resident()))
        Path("/proc/self/clear_refs").write_text("5")

    train(
        plan,
        model_dir=Path(task["model_dir"]),
        train_data=Path(task["data_dir"]),
        valid_data=None,
        output_dir=Path(task["output_dir"]),
        reporter=_Marker(mark),
        resume_from=None,
    )
    mark("ended")
    if not dist.is_initialized() or dist.get_rank() == 0:
        result = {"peak": max(peak for _, peak, _ in phases), "before": before, "phases": phases}
        Path(task["result"]).write_text(json.dumps(result))


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith("Rss")}


class _Marker:
    """A Reporter that marks the phases of the run."""

    def __init__(self, mark: Any) -> None:  # noqa: ANN401
        self._mark = mark

    def started(self, total_steps: int, device: str) -> None:
        self._mark("loaded")

    def metrics(self, metrics: object) -> None:
        self._mark("step")

    def checkpoint(self, checkpoint: object) -> None:
        self._mark("checkpoint")

    def deleted(self, checkpoints: list[Path]) -> None:
        pass

    def should_stop(self) -> bool:
        return False


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Runs the case. The result of its first worker."""
    model, data = write_model(case, folder / "model"), write_rows(case, folder / "data")
    task = {
        "config": case.config(str(model)),
        "model_dir": str(model),
        "data_dir": str(data),
        "output_dir": str(folder / "out"),
        "result": str(folder / "result.json"),
    }
    file = folder / "task.json"
    file.write_text(json.dumps(task))
    (port,) = free_ports(1)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.training_memory", "--worker", str(file)]
    processes = [
        subprocess.Popen(command, env=env | as_rank(rank, case.workers, port), cwd=ROOT) for rank in range(case.workers)
    ]
    codes = [process.wait() for process in processes]
    assert not any(codes), codes
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    if "VERBOSE" in os.environ:
        for phase in result["phases"]:
            print(phase[0], phase[1] >> 20, phase[2], result["before"] >> 20, file=sys.stderr)
    return result


def estimated(case: Case, folder: Path) -> Memory:
    """The estimate for the case that was measured in `folder`."""
    from trainers.training.load import load_of

    plan = make_plan(Config.model_validate(case.config(str(folder / "model"))))
    arch = inspect_model_dir(folder / "model")
    return memory_of(plan, arch, load_of(plan, arch, TokenisedDataset(folder / "data")), "cpu")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(Path(sys.argv[2]).read_text()))
        return
    off = []
    print("| configuration | measured, MiB | estimated, MiB | off by |\n|---|---|---|---|")
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            peak = measured(CASES[name], Path(folder))["peak"]
            memory = estimated(CASES[name], Path(folder))
        error = memory.peak_bytes / peak - 1
        off += [name] if abs(error) > TOLERANCE else []
        print(f"| {name} | {peak >> 20:,} | {memory.peak_bytes >> 20:,} | {error:+.1%} |", flush=True)
    if off:
        sys.exit(f"off by more than {TOLERANCE:.0%}: {', '.join(off)}")


if __name__ == "__main__":
    main()

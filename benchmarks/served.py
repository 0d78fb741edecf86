"""A job of the service against the bare recipe: tokens/s with the same plan on the same rows.

Each of several rounds runs the recipe as a process of its own, without a service on the machine; then it starts a
service, submits the job over HTTP, and stops the service. Speeds are those of the steps after the warm-up; the job's
come from the metrics file that the service writes. Both use all cores but one. (The service's processes need a seventh
of two cores. If a worker used all cores, its other threads would wait whenever they interrupt one.)

    python -m benchmarks.served       about 12 minutes; into benchmarks/training.md
"""

import json
import os
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from benchmarks import workload
from benchmarks.contest import OURS, run_once
from benchmarks.recipe import Material
from benchmarks.report import TRAINING, heading, machine, table, write_section
from events.facts import StepMetrics
from examples.client import Client
from serve_app.local import LocalService

STEPS, WARMUP, ROUNDS = 64, 4, 4
GOAL = 0.99
CORES = max(1, (os.cpu_count() or 1) - 1)


def main() -> int:
    print(machine(), flush=True)
    os.environ["OMP_NUM_THREADS"] = str(CORES)
    bare, served = [], []
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        scratch = Path(folder)
        task = Material(scratch).task("135m", "lora", equal=False, steps=STEPS)
        for number in range(ROUNDS):
            bare.append(run_once(OURS, task).tokens_per_second(WARMUP))
            print(f"  bare       {bare[-1]:7.1f} tok/s", flush=True)
            served.append(run_as_job(Path(task.model_dir), scratch / f"storage-{number}"))
            print(f"  as a job   {served[-1]:7.1f} tok/s", flush=True)
    share = statistics.median(served) / statistics.median(bare)
    verdict = f">= {GOAL:.0%}: {'met' if share >= GOAL else 'missed'}"
    rows = [
        ("bare recipe", _speeds(bare), "", ""),
        ("job of the service", _speeds(served), f"{share:.1%}", verdict),
    ]
    header = ("135M LoRA, defaults", "tok/s (lowest, highest)", "of the bare recipe", "goal")
    head = heading("python -m benchmarks.served", f"{CORES} of the cores for training")
    text = f"{head}\n\n{table(header, rows)}"
    print(f"\n{text}")
    write_section("served", text, TRAINING)
    print(f"-> {TRAINING}")
    return 0


def run_as_job(model: Path, storage: Path) -> float:
    """Tokens/s of a job with the plan of benchmarks.run_ours, on a new service. Raises RuntimeError if it fails."""
    env = {
        "TUNEWRIGHT_DATA_ROOTS": str(workload.TICKETS.parent),
        "TUNEWRIGHT_MODEL_ROOTS": str(model.parent),
        "TUNEWRIGHT_CPUS_PER_WORKER": str(CORES),  # as many threads as the bare run has
    }
    config: dict[str, Any] = {
        "model": str(model),
        "data": str(workload.TICKETS),
        "fine_tuning_options": {
            "custom_training_options": {"finetuning_type": "lora"},
            "extras": {"max_steps_per_epoch": STEPS},
        },
    }
    with LocalService(storage, env=env) as service:
        client = Client(service.url)
        job_id = client.submit(config)["job_id"]
        for _ in client.tail(job_id):
            pass
        job = client.status(job_id)
    if job["status"] != "success":
        raise RuntimeError(f"{job_id} ended as {job['status']}: {job.get('error')}")
    return speed_in(Path(unquote(urlsplit(job["logs"]).path)))


def speed_in(metrics_file: Path) -> float:
    """Tokens/s of the steps after the warm-up, from the times at which they ended."""
    lines = metrics_file.read_text(encoding="utf-8").splitlines()
    steps = [StepMetrics.model_validate(json.loads(line)) for line in lines]
    ends = [datetime.fromisoformat(step.time) for step in steps]
    tokens = sum(step.tokens or 0 for step in steps[WARMUP:])
    return tokens / (ends[-1] - ends[WARMUP - 1]).total_seconds()


def _speeds(speeds: list[float]) -> str:
    return f"{statistics.median(speeds):.1f} ({min(speeds):.1f}, {max(speeds):.1f})"


if __name__ == "__main__":
    sys.exit(main())

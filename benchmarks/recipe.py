"""`make bench-recipe`: our recipe against torchtune's own and TRL's SFTTrainer on this machine.

Every comparison runs its contenders in turn, several rounds, each run in a process of its own. A contender's speed is
the median of its rounds: tokens of rows, without padding, over the time from the end of the last warm-up step to the
end of the last step, so without imports, loading and saving. Memory is the peak of the whole process until then. All
contenders train on the same rows. With equal settings they also have the same order of rows and the same initial
adapters, and their losses are compared step by step. Each contender still has its own implementation of AdamW, head and
loss, as that doesn't change results.

With defaults, ours are those of a submitted job; torchtune's those of its shipped config for the smallest model of the
family (llama3_2/1B, qwen2_5/0.5B; with AdamW if the config has an optimizer that needs a GPU); TRL's those of SFTConfig
and LoraConfig.

    python -m benchmarks.recipe             the whole table, into benchmarks/training.md
    python -m benchmarks.recipe --quick     its first rows, fewer rounds, to the terminal only
    python -m benchmarks.recipe --curves    200 steps: losses in fp32 and in bf16, into benchmarks/training.md
    python -m benchmarks.recipe --only 135m-lora
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.contender import Task
from benchmarks.contest import OURS, TORCHTUNE, TRL, Contender, ContenderFailed, Standing, contest, run_once
from benchmarks.report import TRAINING, heading, machine, table, write_section
from trainers.planning.plan import LoraSpec

CURVE_STEPS = 200
FP32_TOLERANCE = 1e-5
BF16_TOLERANCE = 0.005
MIB = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """`goal`: our speed should be this multiple of every other contender's. `steps` includes the `warmup` steps."""

    name: str
    title: str
    model: str
    method: str
    goal: float
    steps: int
    rounds: int
    warmup: int = 2
    equal: bool = True
    workers: int = 1
    contenders: tuple[Contender, ...] = (OURS, TORCHTUNE, TRL)


_EQUAL: dict[str, Any] = {"goal": 1.4}
_DEFAULTS: dict[str, Any] = {"goal": 2.5, "equal": False, "warmup": 1}
COMPARISONS = (
    Comparison("135m-lora", "135M LoRA, equal", "135m", "lora", steps=10, rounds=3, **_EQUAL),
    Comparison("135m-full", "135M full, equal", "135m", "full", steps=8, rounds=3, **_EQUAL),
    Comparison("135m-lora-defaults", "135M LoRA, defaults", "135m", "lora", steps=3, rounds=3, **_DEFAULTS),
    Comparison("135m-full-defaults", "135M full, defaults", "135m", "full", steps=4, rounds=3, **_DEFAULTS),
    Comparison(
        "135m-lora-2", "135M LoRA, equal, 2 workers", "135m", "lora", goal=2.0, steps=8, rounds=3, workers=2,
        contenders=(OURS, TORCHTUNE),
    ),
    Comparison("05b-lora", "0.5B LoRA, equal", "05b", "lora", goal=1.4, steps=5, rounds=2, warmup=1),
    Comparison("05b-full", "0.5B full, equal", "05b", "full", goal=1.4, steps=4, rounds=2, warmup=1),
    Comparison("05b-lora-defaults", "0.5B LoRA, defaults", "05b", "lora", steps=3, rounds=3, **_DEFAULTS),
    Comparison("05b-full-defaults", "0.5B full, defaults", "05b", "full", steps=4, rounds=3, **_DEFAULTS),
)  # fmt: skip
QUICK = ("135m-lora", "135m-full", "135m-lora-2")
CURVES = (("fp32", OURS), ("fp32", TORCHTUNE), ("mixed", OURS), ("bf16", OURS), ("bf16", TORCHTUNE))
COMPARED = (
    (("fp32", OURS.name), ("fp32", TORCHTUNE.name), FP32_TOLERANCE),
    (("mixed", OURS.name), ("fp32", OURS.name), BF16_TOLERANCE),
    (("bf16", OURS.name), ("bf16", TORCHTUNE.name), BF16_TOLERANCE),
)
HEADER = (
    "comparison", "contender", "tok/s (lowest, highest)", "ours is", "goal", "peak memory", "losses against ours",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description="Our recipe against others.")
    parser.add_argument("--quick", action="store_true", help="three comparisons, one round; about 5 minutes")
    parser.add_argument("--only", action="append", choices=[c.name for c in COMPARISONS], help="repeatable")
    parser.add_argument("--curves", action="store_true", help=f"compare the losses of {CURVE_STEPS} steps instead")
    options = parser.parse_args()
    began = time.monotonic()
    print(f"{machine()}", flush=True)
    if os.getloadavg()[0] > 0.5:
        print("other things run on this machine: what follows is no measurement", flush=True)
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        material = Material(Path(folder))
        if options.curves:
            name, (text, failed) = "curves", curves(material)
        else:
            name, (text, failed) = "recipe", contests(_chosen(options.only, quick=options.quick), material)
    command = " ".join(["python -m benchmarks.recipe", *sys.argv[1:]])
    text = f"{heading(command, f'{(time.monotonic() - began) / 60:.0f} minutes')}\n\n{text}"
    print(f"\n{text}")
    if not (options.quick or options.only):
        write_section(name, text, TRAINING)
        print(f"-> {TRAINING}")
    return 1 if failed else 0


def _chosen(names: Sequence[str] | None, *, quick: bool) -> list[Comparison]:
    chosen = [c for c in COMPARISONS if c.name in (names or (QUICK if quick else [c.name for c in COMPARISONS]))]
    return [replace(c, rounds=1, steps=min(c.steps, 5)) for c in chosen] if quick else chosen


class Material:
    """Makes models and rows in a scratch directory, each when it is first needed. `models`: existing ones."""

    def __init__(self, scratch: Path, models: Mapping[str, Path] | None = None) -> None:
        self._scratch = scratch
        self._models = dict(models or {})

    def model(self, name: str) -> Path:
        if name not in self._models:
            self._models[name] = workload.smollm2() if name == "135m" else workload.random_05b(self._scratch)
        return self._models[name]

    def task(
        self, model: str, method: str, *, equal: bool, steps: int, dtype: str = "fp32", rows: int | None = None
    ) -> Task:
        """A task on the rows of the demo, or on `rows` generated ones of the same kind."""
        model_dir = self.model(model)
        data = self._scratch / f"rows-{rows}"  # both models have the same tokenizer
        if not data.is_dir():
            lines = workload.tickets(rows)
            workload.prepared_rows(model_dir, data, lines)
            workload.conversations(data.with_suffix(".messages.jsonl"), lines)
        lr = 3e-4 if method == "lora" else 2e-5
        task = Task(
            equal=equal,
            method=method,
            dtype=dtype,
            model_dir=str(model_dir),
            data_dir=str(data),
            rows=str(workload.rows_for_others(data)),
            conversations=str(data.with_suffix(".messages.jsonl")),
            adapter=str(self._scratch / f"adapter-{model}.safetensors"),
            output_dir="",
            result="",
            steps=steps,
            lr=lr,
        )
        if method == "lora" and not Path(task.adapter).is_file():
            lora = LoraSpec(attn_modules=task.lora_attn_modules, rank=task.lora_rank, alpha=task.lora_alpha)
            workload.first_adapter(model_dir, lora, Path(task.adapter))
        return task


def contests(chosen: Sequence[Comparison], material: Material) -> tuple[str, bool]:
    """The table of `chosen`, and whether any contender failed."""
    rows: list[tuple[str, ...]] = []
    failures: list[str] = []
    defaults: list[tuple[str, ...]] = []
    for comparison in chosen:
        print(f"{comparison.title} ...", flush=True)
        task = material.task(comparison.model, comparison.method, equal=comparison.equal, steps=comparison.steps)
        standings = contest(
            comparison.contenders, task, workers=comparison.workers, rounds=comparison.rounds, warmup=comparison.warmup
        )
        rows += (found := _rows(comparison, standings))
        print(table(HEADER, found), flush=True)
        for name, standing in standings.items():
            if isinstance(standing, str):
                failures.append(f"**{comparison.title}, {name}** failed:\n\n```text\n{standing[-1500:].strip()}\n```\n")
            elif not comparison.equal:
                settings = ", ".join(f"{key} {value}" for key, value in standing.runs[0].settings.items())
                defaults.append((comparison.title, name, settings))
    parts = [table(HEADER, rows), *failures]
    if defaults:
        parts.append(table(("comparison", "contender", "its defaults"), defaults))
    return "\n".join(parts), bool(failures)


def _rows(comparison: Comparison, standings: dict[str, Standing | str]) -> list[tuple[str, ...]]:
    ours = standings[OURS.name]
    rows: list[tuple[str, ...]] = []
    for name, standing in standings.items():
        if isinstance(standing, str):
            rows.append((comparison.title, name, "failed", "", "", "", ""))
            continue
        speeds = standing.speeds
        cells = [comparison.title, name, f"{standing.speed:.1f} ({min(speeds):.1f}, {max(speeds):.1f})"]
        if name == OURS.name or isinstance(ours, str):
            rows.append((*cells, "", "", _memory(standing), ""))
            continue
        ratio = ours.speed / standing.speed
        met = "met" if ratio >= comparison.goal else "missed"
        less = "" if ours.peak_bytes <= standing.peak_bytes else ": ours needs more"
        losses = f"{_difference(ours.losses, standing.losses):.1e}" if comparison.equal else "other settings"
        memory = f"{_memory(standing)}{less}"
        rows.append((*cells, f"{ratio:.2f}x", f">= {comparison.goal}x: {met}", memory, losses))
    return rows


def _memory(standing: Standing) -> str:
    return f"{standing.peak_bytes / MIB:,.0f} MiB"


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def curves(material: Material) -> tuple[str, bool]:
    """Compares losses over CURVE_STEPS steps of the real model, with equal settings, on rows that are all different.

    Our fp32 against torchtune's fp32 with its cross-entropy in float64 (`ExactCrossEntropy`): the largest difference of
    a step. In bf16 two correct runs diverge by rounding, so the mean losses of the last 20 steps are compared: our
    default, mixed, with our fp32, and our bf16 with torchtune's.
    """
    rows: list[tuple[str, ...]] = []
    failures = []
    for method in ("lora", "full"):
        losses: dict[tuple[str, str], list[float]] = {}
        for dtype, contender in CURVES:
            task = material.task("135m", method, equal=True, steps=CURVE_STEPS, dtype=dtype, rows=CURVE_STEPS * 4)
            task = replace(task, exact_loss=dtype == "fp32")
            print(f"{method} {dtype} {contender.name} ...", flush=True)
            try:
                losses[dtype, contender.name] = run_once(contender, task).losses
            except ContenderFailed as failure:
                failures.append(f"**{method} {dtype}, {contender.name}** failed:\n\n```text\n{failure}\n```\n")
        for one, other, tolerance in COMPARED:
            if one not in losses or other not in losses:
                continue
            ends = [_end(losses[run]) for run in (one, other)]
            if tolerance == FP32_TOLERANCE:
                apart, what = _difference(losses[one], losses[other]), "largest difference of a step"
                shown = f"{apart:.1e}"
            else:
                apart, what = abs(ends[0] - ends[1]) / ends[1], f"mean of steps {CURVE_STEPS - 19} to {CURVE_STEPS}"
                shown = f"{apart:.2%}"
            who = " and ".join(
                f"{name} in {dtype} ({end:.4f})" for (dtype, name), end in zip((one, other), ends, strict=True)
            )
            rows.append((method, who, what, shown, _verdict(apart, tolerance)))
    header = ("135M", "who, and the mean of the last 20 losses", "compared", "apart", "goal")
    return "\n".join([table(header, rows), *failures]), bool(failures)


def _end(losses: Sequence[float]) -> float:
    return sum(losses[-20:]) / 20


def _verdict(apart: float, tolerance: float) -> str:
    return f"<= {tolerance:g}: {'met' if apart <= tolerance else 'missed'}"


if __name__ == "__main__":
    sys.exit(main())

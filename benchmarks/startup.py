"""Time from the start of the process to the end of the first step, by phase: our recipe, torchtune's, TRL's trainer.

    python -m benchmarks.startup            about 3 minutes; into benchmarks/training.md

Each is started ROUNDS times, in turn, for one LoRA step on the 135M model; the files are in the page cache. A second
table has the import time of our recipe by package (-X importtime): the time of a package's own modules, without what
they import from other packages.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.contest import OURS, ROOT, TORCHTUNE, TRL, ContenderFailed, Run, run_once
from benchmarks.recipe import Material
from benchmarks.report import TRAINING, heading, machine, table, write_section

ROUNDS = 3
PACKAGES = 12
PHASES = ("Python itself", "imports", "model: build, load, optimizer", "first step", "total")
_IMPORT_TIME = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")


def main() -> int:
    print(machine(), flush=True)
    taken: dict[str, list[list[float]]] = {contender.name: [] for contender in (OURS, TORCHTUNE, TRL)}
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        task = Material(Path(folder)).task("135m", "lora", equal=True, steps=1)
        for number in range(ROUNDS + 1):
            for contender in (OURS, TORCHTUNE, TRL):
                try:
                    phases = phases_of(run_once(contender, task), Path(contender.command[0]))
                except ContenderFailed as failure:
                    print(f"  {contender.name} failed: {str(failure)[-500:]}", flush=True)
                    continue
                if number:  # the first time fills the page cache
                    taken[contender.name].append(phases)
                    print(f"  {contender.name:<10} {phases[-1]:6.2f} s", flush=True)
    rows = [(phase, *(_median(runs, i) for runs in taken.values())) for i, phase in enumerate(PHASES)]
    imports = [(name, f"{seconds:.2f} s") for name, seconds in import_seconds().most_common(PACKAGES)]
    text = "\n".join(
        [
            f"{heading('python -m benchmarks.startup')}\n",
            table(("phase", *taken), rows),
            table(("package that our recipe imports", "its own modules"), imports),
        ]
    )
    print(f"\n{text}")
    write_section("startup", text, TRAINING)
    print(f"-> {TRAINING}")
    return 0


def phases_of(run: Run, python: Path) -> list[float]:
    """Seconds of each of PHASES."""
    began = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    bare = time.perf_counter() - began
    imported, loaded, first = run.marks["imported"] - run.started, run.marks["loaded"] - run.started, run.ends[0]
    first -= run.started
    return [bare, imported - bare, loaded - imported, first - loaded, first]


def _median(runs: list[list[float]], phase: int) -> str:
    return f"{statistics.median(run[phase] for run in runs):.2f} s" if runs else "failed"


def import_seconds(module: str = "trainers.training.recipe") -> Counter[str]:
    """The seconds that importing `module` spends in the modules of each top-level package."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    found: Counter[str] = Counter()
    for micros, name in _IMPORT_TIME.findall(done.stderr):
        found[name.split(".")[0]] += int(micros) / 1e6  # type: ignore[assignment]  # a Counter of seconds
    return found


if __name__ == "__main__":
    sys.exit(main())

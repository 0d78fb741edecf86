"""Runs contenders in turn, several rounds. Each run is a process of its own that has the machine to itself."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.contender import Task
from tests.ports import free_ports

ROOT = Path(__file__).parent.parent
TRL_PYTHON = Path(os.environ.get("TUNEWRIGHT_TRL_PYTHON") or ROOT / ".venv-trl" / "bin" / "python")
TIMEOUT_S = 1800.0
SAMPLE_S = 1.0


class ContenderFailed(Exception):
    """A contender's process ended without a result. The message is the end of its output."""


@dataclass(frozen=True)
class Contender:
    name: str
    command: tuple[str, ...]
    """The task's file is its last argument."""


OURS = Contender("ours", (sys.executable, "-m", "benchmarks.run_ours"))
TORCHTUNE = Contender("torchtune", (sys.executable, "-m", "benchmarks.run_torchtune"))
TRL = Contender("TRL", (str(TRL_PYTHON), "-m", "benchmarks.run_trl"))


class Run(NamedTuple):
    """The result of one run. Of each step: when it ended (seconds), its tokens without padding, and its loss.
    `peak_bytes`: peak memory of all its processes, up to the end of the last step."""

    ends: list[float]
    tokens: list[int]
    losses: list[float]
    peak_bytes: int
    settings: dict[str, Any]
    started: float
    marks: dict[str, float]
    """`Recording.marks`. Like `started`, when the process was started, on the clock of `ends`."""

    def tokens_per_second(self, warmup: int) -> float:
        """The speed of the steps after the first `warmup`, of which there must be at least one: its end starts the
        clock."""
        return sum(self.tokens[warmup:]) / (self.ends[-1] - self.ends[warmup - 1])


class Standing(NamedTuple):
    """A contender's results after all rounds."""

    runs: list[Run]
    warmup: int

    @property
    def speeds(self) -> list[float]:
        return [run.tokens_per_second(self.warmup) for run in self.runs]

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    @property
    def peak_bytes(self) -> int:
        return max(run.peak_bytes for run in self.runs)

    @property
    def losses(self) -> list[float]:
        return self.runs[0].losses


def contest(
    contenders: Sequence[Contender], task: Task, *, workers: int, rounds: int, warmup: int
) -> dict[str, Standing | str]:
    """Runs every contender, in turn, `rounds` times. A contender that fails is left out from then on; its value is then
    the reason."""
    found: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for contender in contenders:
            if contender.name in failures:
                continue
            try:
                run = run_once(contender, task, workers)
            except ContenderFailed as failure:
                failures[contender.name] = str(failure)
                continue
            found[contender.name].append(run)
            print(f"  {contender.name:<10} {run.tokens_per_second(warmup):7.1f} tok/s", flush=True)
    return {name: failures.get(name) or Standing(runs, warmup) for name, runs in found.items()}


def run_once(contender: Contender, task: Task, workers: int = 1) -> Run:
    """Raises ContenderFailed."""
    with tempfile.TemporaryDirectory(prefix="tunewright-contest-") as folder:
        scratch = Path(folder)
        task = replace(task, output_dir=str(scratch / "out"), result=str(scratch / "result.json"))
        command = [*contender.command, str(task.write(scratch / "task.json"))]
        (port,) = free_ports(1)
        log = scratch / "log"
        processes = []
        started = time.perf_counter()
        with log.open("wb") as out:
            for rank in range(workers):
                env = _environment(workers) | as_rank(rank, workers, port)
                processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))
            try:
                shared_peak = _watch(processes)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        if not Path(task.result).is_file():
            raise ContenderFailed(log.read_text(errors="replace")[-3000:])
        result = json.loads(Path(task.result).read_text())
    tokens = [int(step["tokens"]) for step in result["steps"]]
    return Run(
        [step["at"] for step in result["steps"]],
        tokens if workers == 1 else _tokens_in_order(task),  # a rank of torchtune counts only its own tokens
        [step["loss"] for step in result["steps"]],
        shared_peak if workers > 1 else result["peak_bytes"],
        result["settings"],
        started,
        result["marks"],
    )


def _tokens_in_order(task: Task) -> list[int]:
    """The tokens of each step of a run that takes the rows in the order of the file."""
    assert task.equal
    lines = Path(task.rows).read_text(encoding="utf-8").splitlines()
    lengths = [len(json.loads(line)["input_ids"]) for line in lines[: task.steps * task.batch_size]]
    return [sum(lengths[start : start + task.batch_size]) for start in range(0, len(lengths), task.batch_size)]


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until one of the processes ends. Returns the peak of their memory in bytes, sampled, with shared pages
    counted once (PSS); 0 for a single process, which measures its exact peak itself."""
    deadline = time.monotonic() + TIMEOUT_S
    peak = 0
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if len(processes) == 1:
            try:
                processes[0].wait(SAMPLE_S)
            except subprocess.TimeoutExpired:
                continue
        else:
            peak = max(peak, _pss([process.pid for process in processes]))
            time.sleep(SAMPLE_S)
    return peak


def _pss(pids: Sequence[int]) -> int:
    try:
        return sum(psutil.Process(pid).memory_full_info().pss for pid in pids)
    except psutil.Error:
        return 0  # one has just ended


def _environment(workers: int) -> dict[str, str]:
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    threads = max(1, cores // workers)
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }


def as_rank(rank: int, workers: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set; none for a single worker."""
    if workers == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }

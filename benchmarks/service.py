"""`make bench`: measures latency, start-up time and memory of the service. Writes them into benchmarks/README.md.

It measures from outside, over HTTP, on a service of its own with a tiny random model. Takes about three minutes.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.load import Latency, status_load, submit_latency, tail_latency
from benchmarks.material import job, make_material
from benchmarks.memory import Footprint, footprints
from benchmarks.phases import PHASES, phases
from benchmarks.report import SERVICE, heading, table, write_section
from benchmarks.tune_run import seconds_to_first_step
from events.sqlite import LOG_FILE, SqliteStore
from examples.client import TERMINAL, Client
from serve_app.local import LocalService

SUBMITS = 200
CONNECTIONS = 8
STATUS_S = 10.0
WARM = ("warm 1", "warm 2", "warm 3")
SETTLE_S = 10.0  # for start-up, or the end of a run's processes, to be over
SHORT, LONG = 64, 600  # rows of the jobs that measure the first step, and of the job that measures log lines

console = Console(highlight=False)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        scratch = Path(folder)
        model, data = make_material(scratch, SHORT)
        env = {
            "TUNEWRIGHT_DATA_ROOTS": folder,
            "TUNEWRIGHT_MODEL_ROOTS": folder,
            "TUNEWRIGHT_MAX_WAITING_RUNNERS": "1",  # the jobs of the submit measurement are cancelled, not run
        }
        service = LocalService(scratch / "storage", env=env)
        with service:
            results = asyncio.run(measure_all(service, model, data, scratch))
        store = SqliteStore(service.storage / LOG_FILE)
        try:
            runs = {
                name: phases(posted, store.read_stream(job_id), lines)
                for name, (posted, job_id, lines) in results.pop("runs").items()
            }
        finally:
            store.close()
        console.print("the stock recipe ...")
        stock = seconds_to_first_step(model, data, scratch)
    text = render(results, runs, stock)
    console.print(f"\n{text}\n-> {SERVICE}", markup=False)
    write_section("the service", text, SERVICE)
    return 0


async def measure_all(service: LocalService, model: Path, data: Path, scratch: Path) -> dict[str, Any]:
    console.print("memory at idle ...")
    await asyncio.sleep(SETTLE_S)
    results: dict[str, Any] = {"memory": footprints(service.processes())}
    runs: dict[str, Any] = {}
    client = Client(service.url)
    for name in ("cold", *WARM):
        console.print(f"first step, {name} ...")
        posted = datetime.now(UTC)
        job_id, _, lines = await run_to_its_end(client, job(model, data))
        runs[name] = (posted, job_id, lines)
    console.print("log lines ...")
    _, chatty = make_material(scratch / "long", LONG)
    every_step = job(model, chatty, batch_size=1, extras={"log_every_n_steps": 1})
    job_id, results["tail"], _ = await run_to_its_end(client, every_step)
    console.print("status ...")
    await asyncio.sleep(SETTLE_S)
    results["status"] = await status_load(service.url, job_id, CONNECTIONS, STATUS_S)
    console.print("submit ...")
    results["submit beside"], ids = await submit_latency(service.url, job(model, data), SUBMITS)
    cancel_all(client, ids)
    drain = (sys.executable, "-m", "trainers", "drain")  # after it no runner is started
    await asyncio.to_thread(subprocess.run, drain, env=service.env, check=True)
    await asyncio.sleep(SETTLE_S)
    results["submit"], ids = await submit_latency(service.url, job(model, data), SUBMITS)
    return results | {"runs": runs}


async def run_to_its_end(client: Client, config: dict[str, Any]) -> tuple[str, Latency, list[tuple[str, str]]]:
    """The job's id, the latency of its log lines, and the lines. Raises RuntimeError unless it succeeds."""
    job_id = client.submit(config)["job_id"]
    latency, lines = await tail_latency(client.url, job_id)
    ended = client.status(job_id)
    if ended["status"] != "success":
        raise RuntimeError(f"{job_id} ended as {ended['status']}: {ended.get('error')}")
    return job_id, latency, lines


def cancel_all(client: Client, ids: list[str]) -> None:
    """Cancels jobs, newest first, so that no runner is started for a job that will be cancelled next."""
    for job_id in reversed(ids):
        if client.status(job_id)["status"] not in TERMINAL:
            client.cancel(job_id)


def render(results: dict[str, Any], runs: dict[str, dict[str, float]], stock: float) -> str:
    goals = {
        "submit": ("submit until it is durable (200), one after the other", "p99 < 50 ms"),
        "submit beside": ("the same, while a runner starts on the same cores", ""),
        "status": (f"status, {CONNECTIONS} connections", "500/s, p99 < 50 ms"),
        "tail": ("log line: written by the worker until it is at a tail client", "p99 < 200 ms"),
    }
    latencies: list[tuple[str, ...]] = []
    for key, (what, goal) in goals.items():
        latency: Latency = results[key]
        p50, p99, rate = f"{latency.p50_ms:.1f} ms", f"{latency.p99_ms:.1f} ms", f"{latency.per_second:.0f}/s"
        latencies.append((what, p50, p99, rate, str(latency.n), goal))
    warm = sorted((runs[name] for name in WARM), key=lambda run: run["total"])[len(WARM) // 2]
    taken = [(phase, f"{runs['cold'][phase]:.2f} s", f"{warm[phase]:.2f} s") for phase in PHASES]
    taken.append(("*`tune run` of the stock recipe, same model and rows, no Ray*", "", f"{stock:.2f} s"))
    memory: list[Footprint] = results["memory"]
    sizes = [(row.name, str(row.processes), f"{row.rss_mib:.0f}", f"{row.pss_mib:.0f}") for row in memory]
    total = sum(row.pss_mib for row in memory)
    sizes.append(("**all**", str(sum(row.processes for row in memory)), "", f"**{total:.0f}**"))
    return "\n".join(
        [
            f"{heading('make bench')}\n",
            table(("", "p50", "p99", "rate", "n", "goal"), latencies),
            "Submit to first training step, tiny model, one CPU worker (goal: under 15 s warm):\n",
            table(("phase", "cold", "warm"), taken),
            "Memory at idle, no job running:\n",
            table(("process", "n", "RSS MiB", "PSS MiB"), sizes),
        ]
    )


if __name__ == "__main__":
    argparse.ArgumentParser("python -m benchmarks.service", description=__doc__).parse_args()
    started = time.monotonic()
    code = main()
    console.print(f"took {time.monotonic() - started:.0f} s")
    sys.exit(code)

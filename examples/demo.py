"""`make demo`: a real pretrained model, fine-tuned by the real service on this machine, in under four minutes.

It starts the service (or uses the one at $TUNEWRIGHT_URL), submits examples/tickets/job.json over HTTP, follows the
job, and compares the model before and after. Ctrl-C cancels the job and stops what was started.
"""

# ruff: noqa: E402
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # during imports there is nothing to stop: end silently

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from examples.client import TERMINAL, ApiError, Client, Job
from serve_app.local import LocalService, ServiceError
from trainers.settings import InvalidSettingsError, settings

ROOT = Path(__file__).parent.parent
TASK = ROOT / "examples" / "tickets"
POLL_S = 0.5
SAMPLES = 3

console = Console(highlight=False)


class DemoFailed(Exception):
    """The demo can't go on; the message is for its user."""


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="tunewright-demo-") as scratch:
            # The model before training is scored while the service starts: both take about as long.
            baseline = Scoring(job_config()["model"], Path(scratch) / "before.json")
            with baseline, service() as client:
                before = baseline.result("Asking the model as it is")
                job = train(client)
                with Scoring(str(model_of(job)), Path(scratch) / "after.json") as scoring:
                    after = scoring.result("Asking the fine-tuned model the same")
                report(client, job, before, after)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    except httpx.TransportError as error:
        console.print(f"[red bold]The service stopped answering.[/] {escape(str(error))}")
        return 1
    except (DemoFailed, ServiceError, ApiError, InvalidSettingsError) as error:
        console.print(f"[red bold]The demo failed.[/] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


def job_config() -> dict[str, Any]:
    """examples/tickets/job.json, with absolute paths: the service may run in another directory."""
    config: dict[str, Any] = json.loads((TASK / "job.json").read_text())
    return config | {name: str(ROOT / config[name]) for name in ("data", "validation_data")}


@contextmanager
def service() -> Iterator[Client]:
    """A client of the service at $TUNEWRIGHT_URL or, if that isn't set, of one that runs as long as this block."""
    if url := os.environ.get("TUNEWRIGHT_URL"):
        client = Client(url)
        if not client.healthy():
            raise DemoFailed(f"TUNEWRIGHT_URL is set, but nothing answers at {url}/healthz")
        console.print(f"Using the service at [bold]{url}[/]")
        yield client
        return
    env = {
        "TUNEWRIGHT_DATA_ROOTS": str(ROOT / "examples"),
        "TUNEWRIGHT_CPUS_PER_WORKER": str(os.cpu_count()),  # one job, the whole machine
    }
    local = LocalService(settings().storage, env=env)
    try:
        with console.status("Starting Ray and the service on this machine ..."):
            local.start()
        console.print(f"Service    [bold]{local.url}[/]   (documented at {local.url}/docs)")
        console.print(f"Dashboard  [bold]{local.dashboard_url}[/]")
        yield Client(local.url)
    finally:
        with console.status("Stopping the service ..."):
            local.stop()


def train(client: Client) -> Job:
    """Submits the job and follows it to its end. Raises DemoFailed unless it succeeds; Ctrl-C cancels it."""
    job = client.submit(job_config())
    console.print(f"Submitted  [bold]{job['job_id']}[/]")
    try:
        job = follow(client, job)
    except KeyboardInterrupt:
        with console.status("Cancelling the job ..."):
            cancel(client, job["job_id"])
        raise
    if job["status"] != "success":
        raise DemoFailed(describe_failure(job))
    return job


def follow(client: Client, job: Job) -> Job:
    """Shows the job's log as it is written, above a bar with step and loss. Returns the job once it has ended."""
    columns = (
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("submitted", total=None, loss="")
        log = threading.Thread(target=show_log, args=(client, job["job_id"], progress.console), daemon=True)
        log.start()
        pause = threading.Event()
        while job["status"] not in TERMINAL:
            job = client.status(job["job_id"])
            show(progress, bar, job)
            pause.wait(POLL_S)
        log.join(timeout=10)
    return job


def show_log(client: Client, job_id: str, screen: Console) -> None:
    for line in client.tail(job_id):
        screen.print(f"  [dim]{escape(line['message'])}[/]", soft_wrap=True)


def show(progress: Progress, bar: Any, job: Job) -> None:  # noqa: ANN401 -- rich's TaskID is an int in disguise
    if job["status"] != "running":
        progress.update(bar, description=job["status"], loss=job.get("why", ""))
        return
    done, metrics = job["progress"], job.get("metrics") or {}
    loss = f"loss {metrics['loss']:.3f}" if metrics.get("loss") is not None else "first step ..."
    if progress.tasks[bar].total is None:
        progress.reset(bar, total=done["total_steps"], description="training")  # the clock starts with training
    progress.update(bar, completed=done["step"], loss=loss)


def cancel(client: Client, job_id: str) -> None:
    """Cancels the job, and returns when its resources are free again. A job that has ended is left as it is."""
    pause = threading.Event()
    try:
        job = client.cancel(job_id)
        while job["status"] not in TERMINAL:
            pause.wait(POLL_S)
            job = client.status(job_id)
    except ApiError as refused:
        if refused.status != 409:
            raise


def describe_failure(job: Job) -> str:
    error = job.get("error") or {"code": job["status"], "message": "somebody else cancelled it", "fault": "user"}
    lines = [f"Job {job['job_id']} ended as {job['status']}.", f"{error['code']}: {error['message']}"]
    if job.get("error_path"):
        lines.append(f"The traceback is in {path_of(job['error_path'])}")
    return "\n".join(lines)


class Scoring:
    """A run of examples.score in a process of its own, so that its memory is freed. The process ends with the block."""

    def __init__(self, model: str, out: Path) -> None:
        self._out = out
        self._log = out.with_suffix(".log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "examples.score", model, str(TASK / "heldout.jsonl"), str(out)],
                cwd=ROOT, env=os.environ | {"TUNEWRIGHT_STORAGE": str(settings().storage)}, stdout=log, stderr=log,
                start_new_session=True,  # so that Ctrl-C reaches the demo only
            )  # fmt: skip

    def result(self, what: str) -> dict[str, Any]:
        with console.status(f"{what} ...") if self._process.poll() is None else nullcontext():
            code = self._process.wait()
        if code != 0:
            raise DemoFailed(f"examples.score failed:\n{self._log.read_text(errors='replace')[-2000:]}")
        scores: dict[str, Any] = json.loads(self._out.read_text())
        return scores

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def model_of(job: Job) -> Path:
    """The fine-tuned model of the last checkpoint, in Hugging Face layout."""
    checkpoint = path_of(job["checkpoints"][-1])
    return checkpoint / "merged" if (checkpoint / "merged").is_dir() else checkpoint


def path_of(uri: str) -> Path:
    return Path(url2pathname(urlsplit(uri).path))


def report(client: Client, job: Job, before: dict[str, Any], after: dict[str, Any]) -> None:
    metrics = job["metrics"]
    numbers = Table(
        "", "before", "after", title=f"\nWhat {job['progress']['total_steps']} steps did", title_justify="left"
    )
    numbers.add_row("validation loss", f"{metrics['first_valid_loss']:.3f}", f"{metrics['valid_loss']:.3f}")
    numbers.add_row("exactly right answers", *(f"{s['exact']} of {s['rows']}" for s in (before, after)))
    console.print(numbers)

    samples = Table("asked", "before", "after", "right", show_lines=True)
    for old, new in list(zip(before["answers"], after["answers"], strict=True))[:SAMPLES]:
        samples.add_row(*(escape(text) for text in (old["prompt"], old["answer"], new["answer"], new["expected"])))
    console.print(samples)

    line = partial(console.print, soft_wrap=True)  # so that lines to be copied aren't broken
    line(f"\nCheckpoint  {model_of(job)}")
    line("            (transformers and vLLM load it as it is; the adapter for PEFT is next to it)")
    line(f"The job     curl '{client.url}/fine_tuning/jobs/status?job_id={job['job_id']}'")
    if "TUNEWRIGHT_URL" not in os.environ:
        line("            The demo stops its service now, but the job stays: run `make serve`, and ask on port 8000.")


if __name__ == "__main__":
    sys.exit(main())

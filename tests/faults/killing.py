"""Kills parts of a service one by one while jobs run, and measures how long each recovery takes."""

import json
import re
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from serve_app.local import LocalService
from tests.service.conftest import Api, local_service, make_inputs, title
from tests.waiting import eventually

RECOVERY_S = 600.0
"""Time limit for an interrupted job to train again, on a machine that is busy with other things."""
UNOWNED_S = 30.0
"""Longest time that the status of a job may be `running` although a process that it depends on was killed."""
ROWS, BATCH, EPOCHS, INTERVAL = 160, 2, 10, 20
STEPS = ROWS // BATCH * EPOCHS
"""Steps of a job of these tests. It saves a checkpoint every INTERVAL steps."""


def inputs_in(directory: Path) -> Path:
    """A directory with a tiny model (`tiny`) and data (`rows.jsonl`)."""
    return make_inputs(directory, ROWS, "It is {0}. " * 8)


def a_service(storage: Path, inputs: Path) -> LocalService:
    return local_service(storage, inputs, TUNEWRIGHT_MAX_WAITING_RUNNERS="1")


class Recovery(NamedTuple):
    """Seconds after a kill. `unowned_s`: until the job's status was no longer `running` (0: no process that it depends
    on was killed); `resumed_s`: until it had trained a step further; `door_s`: until the last request that the API did
    not answer, or answered with an error."""

    kind: str
    unowned_s: float
    resumed_s: float
    door_s: float


OWNERS: dict[str, list[tuple[str, ...]]] = {
    "worker": [("RayTrainWorker", "{job}")],
    "runner": [("trainers run {job}",)],
    "runner's supervisor": [("JobSupervisor",)],
    "all of these, and the dispatcher": [
        ("trainers run {job}",),
        ("JobSupervisor",),
        ("RayTrainWorker", "{job}"),
        ("DispatcherActor",),
    ],
}
"""Processes that a running job depends on: words in their titles."""
OTHERS: dict[str, list[tuple[str, ...]]] = {
    "event log": [("EventLogActor",)],
    "log queue": [("LogQueueActor",)],
    "dispatcher": [("DispatcherActor",)],
    "Serve replica": [("ServeReplica",)],
    "Serve controller": [("ServeController",)],
    "proxy": [("haproxy", "-f")],
    "proxy's manager": [("HAProxyManager",)],
}
"""Processes that the service depends on, but not a running job: words in their titles."""


@dataclass
class Faults:
    """The service, and ways to kill parts of it."""

    api: Api

    def kill(self, kind: str, job_id: str) -> None:
        """Sends SIGKILL to every process of the kind. There must be at least one."""
        patterns = [[word.format(job=job_id) for word in words] for words in (OWNERS | OTHERS)[kind]]
        victims = [process for words in patterns for process in self._found(words)]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)

    def _found(self, words: list[str]) -> list[psutil.Process]:
        def complaint() -> str:
            return f"no process {words} among {list(map(title, self.api.service.processes()))}"

        return eventually(lambda: self.api.processes(*words), 60, complaint)

    def kill_and_recover(self, kind: str, job_id: str) -> Recovery:
        """Kills one kind of process while the job runs, and waits until the job has trained further."""
        before = self.job(job_id)
        began = time.monotonic()
        self.kill(kind, job_id)
        unowned_s = door_s = 0.0

        def recovered() -> bool:
            nonlocal unowned_s, door_s
            since = time.monotonic() - began
            try:
                job = self.api.job(job_id)
            except (httpx.HTTPError, AssertionError):
                door_s = since
                return False
            if kind in OWNERS and not unowned_s and job["status"] != "running":
                unowned_s = since
            if job["status"] == "success":
                return True
            started = job["attempt"] > before["attempt"] if kind in OWNERS else job["attempt"] == before["attempt"]
            resumed = step_of(job) > (0 if kind in OWNERS else step_of(before) + 1)
            return job["status"] == "running" and started and resumed

        eventually(recovered, RECOVERY_S, lambda: f"after the loss of the {kind}: {self.job(job_id)}")
        return Recovery(kind, unowned_s, time.monotonic() - began, door_s)

    def job(self, job_id: str) -> dict[str, Any]:
        """The job, once the API answers."""

        def answered() -> dict[str, Any] | None:
            with suppress(httpx.HTTPError, AssertionError):
                return self.api.job(job_id)
            return None

        return eventually(answered, RECOVERY_S, lambda: "the API does not answer")

    def until_up(self) -> None:
        """Returns once the API answers."""

        def answers() -> bool:
            with suppress(httpx.HTTPError):
                return self.api.http.get("/healthz").is_success
            return False

        eventually(answers, RECOVERY_S, lambda: "the API does not answer")

    def submit(self, **changes: Any) -> str:
        """Submits a job, with an Idempotency-Key: an event log that was killed doesn't know which answers were
        delivered, and would take the next submit of the same config for a retry of this one."""
        return self.api.submit(self.config(**changes), headers={"Idempotency-Key": uuid.uuid4().hex})

    def config(self, **changes: Any) -> dict[str, Any]:
        """The config of a job that saves often and may be interrupted often."""
        options = {
            "n_epochs": EPOCHS,
            "batch_size": BATCH,
            "extras": {"save_every_n_steps": INTERVAL, "keep_last_n_checkpoints": 2, "dtype": "fp32"},
        }
        return self.api.config(**{"fine_tuning_options": options, "overrides": "--max-restarts 1000"} | changes)

    def until(self, job_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        job: dict[str, Any] = {}

        def holds() -> bool:
            nonlocal job
            job = self.job(job_id)
            return condition(job)

        eventually(holds, RECOVERY_S, lambda: f"the job stays {job}")
        return job


def step_of(job: dict[str, Any]) -> int:
    return int((job.get("progress") or {}).get("step", 0))


def logged(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The job's metrics from its disk logger, without those that depend on the clock or the machine."""
    varies = {"time", "tokens_per_second", "peak_memory_bytes"}
    lines = Path(job["logs"].removeprefix("file://")).read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in varies} for line in lines]


def steps_by_attempt(messages: list[str]) -> list[list[int]]:
    """The steps in the job's log lines, a list for each attempt. Each list begins with the step it went on after."""
    attempts: list[list[int]] = []
    for message in messages:
        if re.match(r"\d+ workers? on ", message):
            _, resumed, step = message.partition(" | going on after step ")
            attempts.append([int(step) if resumed else 0])
        elif message.startswith("step ") and "/" in message:
            attempts[-1].append(int(message.removeprefix("step ").partition("/")[0]))
    return attempts

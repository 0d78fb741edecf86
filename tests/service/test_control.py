"""Pausing, draining and going on, on real Ray: what is asked for happens, and no step is lost or done twice."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve_app.local import START_TIMEOUT_S, LocalService, serve_config
from tests.service.conftest import CPUS, Api, dashboard, free_cpus, local_service, path_of, workers_of
from tests.service.nodes import another_node, held_by, submit_to
from tests.waiting import WAIT_S, eventually

pytestmark = pytest.mark.timeout(900)  # each wait in these has a limit of its own

ROOT = Path(__file__).parents[2]
FP32 = {"n_epochs": 10_000, "lr": 0.01, "extras": {"dtype": "fp32"}}


def losses(job: dict[str, Any]) -> dict[int, float]:
    """By step, from the job's metrics file. A step that was done twice fails the test."""
    entries = [json.loads(line) for line in path_of(job["logs"]).read_text().splitlines()]
    steps = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    assert len(dict(steps)) == len(steps)
    return dict(steps)


def step_of(job: dict[str, Any]) -> int:
    return int(job.get("progress", {}).get("step", 0))


def post(api: Api, action: str, **body: Any) -> dict[str, Any]:
    answer = api.http.post(f"/fine_tuning/jobs/{action}", json=body)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def until_paused(api: Api, job_id: str) -> dict[str, Any]:
    return api.until(job_id, lambda job: job.get("why") == "paused, until it is resumed")


def test_a_paused_job_holds_nothing_and_goes_on_as_if_it_had_not_been_paused(api: Api) -> None:
    undisturbed = api.submit(api.config(fine_tuning_options=FP32))
    job_id = api.submit(api.config(fine_tuning_options=FP32, overrides="--max-restarts 0"))
    api.until(job_id, lambda job: step_of(job) > 0)
    assert post(api, "pause", job_id=job_id)["pause_requested"]
    paused = until_paused(api, job_id)
    assert (paused["status"], paused["interruptions"]) == ("queued", 0)
    stopped_at = step_of(paused)
    assert max(losses(paused)) == stopped_at
    assert paused["checkpoints"][-1].endswith(f"step-{stopped_at:08d}")
    assert workers_of(api, job_id) == []
    api.until(undisturbed, lambda job: step_of(job) > 0)
    assert free_cpus(api) == CPUS - 1

    assert not post(api, "resume", job_id=job_id)["pause_requested"]
    api.until(job_id, lambda job: step_of(job) > stopped_at + 50)
    runs = dashboard(api, "/api/train/v2/runs/v1")["train_runs"]
    drivers = {run["job_id"] for run in runs if run["name"] == job_id}
    assert ([run["name"] for run in runs].count(job_id), len(drivers)) == (2, 1)
    api.until(undisturbed, lambda job: step_of(job) > stopped_at + 50)
    for one in (job_id, undisturbed):
        api.cancel(one)
        api.until_status(one, "cancelled")
    ours, theirs = losses(api.job(job_id)), losses(api.job(undisturbed))
    both = ours.keys() & theirs.keys()
    assert both >= set(range(1, stopped_at + 50))
    assert [ours[step] for step in sorted(both)] == [theirs[step] for step in sorted(both)]

    full = {"custom_training_options": {"finetuning_type": "full"}, "n_epochs": 1, "extras": {"max_steps_per_epoch": 2}}
    again = post(api, "resubmit", job_id=job_id, config={"fine_tuning_options": full})
    job = api.until_status(again["job_id"], "success")
    assert job["resubmitted_from"] == {"job_id": job_id, "checkpoint": api.job(job_id)["checkpoints"][-1]}
    assert job["progress"]["step"] == 2
    assert losses(job)[1] < ours[1] - 0.5  # of the same rows: it starts from what the first job has learnt


class Tail:
    """A reader of one job's log, until its stream ends."""

    def __init__(self, api: Api, job_id: str, after: int = 0) -> None:
        self.lines: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self._url = f"{api.service.url}/fine_tuning/jobs/tail?job_id={job_id}&after={after}"
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        eventually(lambda: bool(self.lines), WAIT_S, lambda: f"no line: {self.error}")

    def _read(self) -> None:
        try:
            with httpx.stream("GET", self._url, timeout=WAIT_S, trust_env=False) as stream:
                for line in stream.iter_lines():
                    self.lines.append(json.loads(line))
        except httpx.HTTPError as error:
            self.error = error

    def end(self) -> dict[str, Any]:
        """Its last line."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        assert self.error is None
        return self.lines[-1]


def messages(tail: Tail) -> list[str]:
    return [log["message"] for line in tail.lines for log in line["logs"]]


def test_a_service_that_is_told_to_end_ends_at_checkpoints_and_goes_on_after_its_restart(
    tmp_path: Path, inputs: Path
) -> None:
    storage = tmp_path / "storage"
    planned = local_service(storage, inputs)  # for its free ports
    planned.stop()
    ports = [url.rpartition(":")[2] for url in (planned.url, planned.dashboard_url)]
    roots = {"TUNEWRIGHT_DATA_ROOTS": str(inputs), "TUNEWRIGHT_MODEL_ROOTS": str(inputs)}
    env = os.environ | roots | {"TUNEWRIGHT_STORAGE": str(storage), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "serve_app.local", "--port", ports[0], "--dashboard-port", ports[1]]
    with subprocess.Popen(command, cwd=ROOT, env=env) as process:
        try:
            before = Api(planned, inputs / "tiny", inputs / "rows.jsonl")
            eventually(lambda: is_up(planned), START_TIMEOUT_S, lambda: "the service does not come up")
            job_id = before.submit(before.config(fine_tuning_options=FP32, overrides="--max-restarts 0"))
            before.until(job_id, lambda job: step_of(job) > 0)
            tail = Tail(before, job_id)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    last = tail.end()
    assert last == {"logs": [], "next": len(messages(tail))}
    with local_service(storage, inputs) as service:
        after = Api(service, inputs / "tiny", inputs / "rows.jsonl")
        job = after.until(job_id, lambda job: job["attempt"] == 2 and job["status"] == "running")
        assert job["interruptions"] == 0
        stopped_at = int(job["checkpoints"][0].rpartition("-")[2])
        job = after.until(job_id, lambda job: step_of(job) > stopped_at)
        done = sorted(losses(job))  # read once: the job goes on
        assert done == list(range(1, len(done) + 1))

        tail = Tail(after, job_id, after=last["next"])
        workers = workers_of(after, job_id)
        service._dashboard("PUT", "/api/serve/applications/", json=serve_config() | {"applications": []})
        last = tail.end()
        assert (last["logs"], "status" in last) == ([], False)
        service._dashboard("DELETE", "/api/serve/applications/")  # as `serve shutdown`
        eventually(lambda: not is_up(service), WAIT_S, lambda: "the API stays")
        assert workers
        assert all(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
        service._deploy()
        assert after.job(job_id)["attempt"] == 2
        after.cancel(job_id)
        after.until_status(job_id, "cancelled")


def is_up(service: LocalService) -> bool:
    try:
        return httpx.get(f"{service.url}/healthz", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def test_workers_stand_in_equal_shares_of_the_nodes_and_move_at_a_checkpoint_from_one_that_is_drained(
    tmp_path: Path, inputs: Path
) -> None:
    env = {"TUNEWRIGHT_DATA_ROOTS": str(inputs), "TUNEWRIGHT_MODEL_ROOTS": str(inputs), "OMP_NUM_THREADS": "1"}
    with LocalService(tmp_path / "storage", num_cpus=0, env=env) as service, ExitStack() as cluster:
        api = Api(service, inputs / "tiny", inputs / "rows.jsonl")
        big = cluster.enter_context(another_node(service, cpus=2)).node_id  # it has room for both workers
        leaving = cluster.enter_context(another_node(service)).node_id
        overrides = "--nnodes 2 --nproc_per_node 1 --max-restarts 0"
        job_id = submit_to(api, api.config(fine_tuning_options=FP32, overrides=overrides))
        api.until(job_id, lambda job: step_of(job) > 0)
        assert len(workers_of(api, job_id)) == 2
        assert held_by(service, job_id) == {big: 1, leaving: 1}

        staying = cluster.enter_context(another_node(service)).node_id
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={service.ray_address}"]
        drain += [f"--node-id={leaving}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        drain += ["--deadline-remaining-seconds=600"]
        subprocess.run(drain, env=service.env, check=True, capture_output=True, timeout=WAIT_S)
        job = api.until(job_id, lambda job: job["attempt"] == 2 and job["status"] == "running")
        assert job["interruptions"] == 0
        stopped_at = int(job["checkpoints"][-1].rpartition("-")[2])
        job = api.until(job_id, lambda job: step_of(job) > stopped_at)
        done = sorted(losses(job))  # read once: the job goes on
        assert done == list(range(1, len(done) + 1))
        assert held_by(service, job_id) == {big: 1, staying: 1}
        api.cancel(job_id)
        api.until_status(job_id, "cancelled")

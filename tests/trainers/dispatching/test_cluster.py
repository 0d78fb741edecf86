"""How `Cluster` understands the answers of Ray's dashboard, and its silence. (tests/service has a real dashboard.)"""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.waiting import eventually
from trainers.dispatching.cluster import Cluster

WITH_404 = "ftjob-01KAV4046H8M4QJ5B1W2E7TXCN"


class Dashboard(ThreadingHTTPServer):
    """Answers as Ray's does, for a job with `status` and `text`; for as long as it is `hanging`, not at all."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.text = 404, ""
        self.deleted: list[str] = []
        self.submitted: list[dict[str, Any]] = []
        self.hanging = threading.Event()
        self.over = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        if self.server.hanging.is_set():
            self.server.over.wait()
            return
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.text.encode())

    def do_DELETE(self) -> None:
        self.server.deleted.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"deleted": true}')

    def do_POST(self) -> None:
        submission = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.submitted.append(submission)
        self.send_response(200)
        self.end_headers()
        known = dict.fromkeys(("job_id", "submission_id"), submission["submission_id"])
        self.wfile.write(json.dumps(known).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    server = Dashboard()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f"127.0.0.1:{server.server_port}"
    monkeypatch.setattr("trainers.dispatching.cluster.get_webui_url_from_internal_kv", lambda: there)
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def test_a_runs_workers_manage_a_gpus_memory_in_segments_that_grow_unless_the_operator_says_otherwise(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    Cluster().start_runner(WITH_404, {})
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    Cluster().start_runner(WITH_404, {})
    first, second = (submission["runtime_env"]["env_vars"] for submission in dashboard.submitted)
    assert first["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in second  # the workers inherit the operator's


def test_a_python_whose_path_has_a_space_runs_the_runner(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "my project" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    Cluster().start_runner(WITH_404, {})
    (submission,) = dashboard.submitted
    shell = ["/bin/sh", "-c", submission["entrypoint"]]
    run = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert run.stdout == f"-m trainers run {WITH_404}\n"


def test_a_job_that_ray_does_not_know_has_no_runner(dashboard: Dashboard) -> None:
    dashboard.text = f"Job {WITH_404} does not exist"
    assert Cluster().runner(WITH_404).state == "absent"


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_address_of_another_cluster_in_the_environment_is_ignored(
    variable: str, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    Cluster().start_runner(WITH_404, {})
    assert [submission["submission_id"] for submission in dashboard.submitted] == [WITH_404]


def test_a_dashboard_that_registers_late_is_found(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    with monkeypatch.context() as before:
        before.setattr("trainers.dispatching.cluster.get_webui_url_from_internal_kv", lambda: None)
        with pytest.raises(ConnectionError):
            cluster.runner(WITH_404)
    assert cluster.runner(WITH_404).state == "absent"


def test_two_runners_of_one_job_that_ended_alike_are_told_apart(dashboard: Dashboard) -> None:
    dashboard.status, cluster = 200, Cluster()
    lost = []
    for start_time in (1_796_018_000_000, 1_796_018_060_000):
        job = {"type": "SUBMISSION", "entrypoint": "", "status": "FAILED", "message": "m", "start_time": start_time}
        dashboard.text = json.dumps(job)
        lost.append(cluster.runner("ftjob-1"))
    assert [runner.state for runner in lost] == ["ended", "ended"]
    assert lost[0] != lost[1]


def test_an_error_about_a_job_whose_id_contains_404_says_nothing_about_its_runner(dashboard: Dashboard) -> None:
    """Taken for absent, a job that runs would be interrupted, and its placement group removed."""
    dashboard.status, dashboard.text = 500, f"Traceback: timed out while asking for {WITH_404}"
    with pytest.raises(RuntimeError, match="status code 500"):
        Cluster().runner(WITH_404)


def test_a_clock_that_was_set_back_an_hour_does_not_keep_a_job_from_its_next_runner(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise ValueError("no such actor")

    monkeypatch.setattr("trainers.dispatching.cluster.ray.get_actor", gone)
    monkeypatch.setattr("trainers.dispatching.cluster.WATCHED_S", 0.2)
    dashboard.status, cluster, began = 200, Cluster(), time.monotonic()
    job = {"type": "SUBMISSION", "entrypoint": "", "status": "FAILED", "end_time": int(time.time() + 3600) * 1000}
    dashboard.text = json.dumps(job)
    assert not cluster.forget_runner("ftjob-1")
    assert eventually(lambda: cluster.forget_runner("ftjob-1"), 10.0, lambda: "it is not forgotten")
    assert time.monotonic() - began >= 0.2  # Ray has looked at it once more
    assert dashboard.deleted == ["/api/jobs/ftjob-1"]
    assert not cluster.forget_runner("ftjob-1")  # its next runner, should that end


def test_a_dashboard_that_hangs_does_not_hang_the_caller(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    assert cluster.runner("ftjob-1").state == "absent"
    monkeypatch.setattr("trainers.dispatching.cluster.ANSWER_S", 0.2)
    dashboard.hanging.set()
    with pytest.raises(requests.Timeout):
        cluster.runner("ftjob-1")

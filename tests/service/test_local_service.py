"""The local service starts next to whatever else runs on this machine, goes on where it stopped, and leaves nothing."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve_app.local import START_TIMEOUT_S, LocalService, ServiceError, _free_block, ray_env, serve_config
from serve_app.scratch import LOCK_FILE, PREFIX
from tests.service.conftest import FP32, Api, local_service, losses, step_of, workers_of
from tests.waiting import WAIT_S, eventually

ROOT = Path(__file__).parents[2]


def listening_beyond_loopback(processes: list[psutil.Process]) -> set[int]:
    """Ports of these processes that other machines can reach."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended since
            found |= {c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return {address.port for address in found if address.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}


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


@pytest.mark.timeout(900)  # each wait has a limit of its own
def test_a_service_that_is_told_to_end_ends_at_checkpoints_and_goes_on_after_its_restart(
    tmp_path: Path, inputs: Path
) -> None:
    storage = tmp_path / "storage"
    planned = local_service(storage, inputs)  # for its free ports
    planned.stop()
    # Any port of a user's will do: the dashboard's is one that Ray would keep for its workers.
    ports = [planned.url.rpartition(":")[2], str(_free_block(1))]
    roots = {"TUNEWRIGHT_DATA_ROOTS": str(inputs), "TUNEWRIGHT_MODEL_ROOTS": str(inputs)}
    env = os.environ | roots | {"TUNEWRIGHT_STORAGE": str(storage), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "serve_app.local", "--port", ports[0], "--dashboard-port", ports[1]]
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    abandoned = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
    (abandoned / LOCK_FILE).touch()
    with subprocess.Popen(command, cwd=ROOT, env=env) as process:
        try:
            before = Api(planned, inputs / "tiny", inputs / "rows.jsonl")
            eventually(lambda: is_up(planned), START_TIMEOUT_S, lambda: "the service does not come up")
            processes = psutil.Process(process.pid).children(recursive=True)
            assert listening_beyond_loopback(processes) == set()
            its_env = processes[0].environ()
            assert not abandoned.exists()
            lock = Path(its_env["RAY_TMPDIR"]) / LOCK_FILE
            for holder in (psutil.Process(process.pid), processes[0]):
                assert str(lock) in {file.path for file in holder.open_files()}
            for name, path in (("STATS", "stats"), ("METRICS", "metrics")):
                port = its_env[f"RAY_SERVE_HAPROXY_{name}_PORT"]
                assert httpx.get(f"http://127.0.0.1:{port}/{path}", trust_env=False).is_success

            second = [sys.executable, "-m", "serve_app.local"]
            refused = subprocess.run(second, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
            assert refused.returncode == 2
            assert f"another service is running in {storage}: stop it with 'kill {process.pid}'" in refused.stdout

            job_id = before.submit(before.config(fine_tuning_options=FP32, overrides="--max-restarts 0"))
            before.until(job_id, lambda job: step_of(job) > 0)
            processes = psutil.Process(process.pid).children(recursive=True)
            tail = Tail(before, job_id)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
        assert not any(process.is_running() for process in processes)
        assert not Path(its_env["RAY_TMPDIR"]).exists()
        assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
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

        workers = workers_of(after, job_id)
        assert workers
        nothing = serve_config() | {"applications": []}
        for method, body in (("PUT", nothing), ("DELETE", None)):  # `serve deploy` of nothing, and `serve shutdown`
            tail = Tail(after, job_id, after=last["next"])
            service._dashboard(method, "/api/serve/applications/", json=body)
            last = tail.end()
            assert (last["logs"], "status" in last) == ([], False)
            eventually(lambda: not is_up(service), WAIT_S, lambda: "the API stays")
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


@pytest.mark.parametrize("how", [[signal.SIGHUP], [signal.SIGINT] * 4], ids=["a closed terminal", "four Ctrl-C"])
def test_a_service_leaves_nothing_running_however_it_is_told_to_end(tmp_path: Path, how: list[signal.Signals]) -> None:
    ports = ["--port", str(_free_block(1)), "--dashboard-port", str(_free_block(1))]
    env = os.environ | {"TUNEWRIGHT_STORAGE": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "serve_app.local", *ports],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # what the tests run in may not
    ) as process:
        started = psutil.Process(process.pid)
        (head,) = eventually(started.children, WAIT_S, lambda: "it starts nothing")
        eventually(head.children, WAIT_S, lambda: "Ray starts nothing")
        begun = [head, *head.children(recursive=True)]
        assert process.stdout is not None
        process.stdout.close()
        for signal_ in how:
            process.send_signal(signal_)
            time.sleep(0.5)  # a user's pace: it is amid its stop
        try:
            process.wait(WAIT_S)
            assert psutil.wait_procs(begun, timeout=1)[1] == []
        finally:
            for left in begun:
                with suppress(psutil.NoSuchProcess):
                    left.kill()


def test_a_port_that_is_taken_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import socket, sys; s = socket.create_server(('127.0.0.1', 0));"
         "print(s.getsockname()[1], flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as squatter:  # fmt: skip
        assert squatter.stdout is not None
        port = int(squatter.stdout.readline())
        service = LocalService(tmp_path, http_port=port)
        with pytest.raises(ServiceError, match=str(port)):
            service.start()
        assert service.processes() == []


def test_the_environment_is_explicit_about_everything_ray_would_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere.else:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    service = LocalService(tmp_path, env={"RAY_AUTH_MODE": "token"})
    try:
        assert service.env["RAY_ADDRESS"] == service.ray_address
        assert "RAY_AUTH_TOKEN" not in service.env
        token = Path(service.env["RAY_AUTH_TOKEN_PATH"])
        assert len(token.read_text()) == 64
        assert token.stat().st_mode & 0o077 == 0
        assert ray_env().items() - {("RAY_AUTH_MODE", "disabled")} <= service.env.items()
        assert os.environ["RAY_ADDRESS"] == "somewhere.else:6379"
    finally:
        service.stop()


def test_what_it_deploys_is_serve_yaml() -> None:
    assert [application["import_path"] for application in serve_config()["applications"]] == ["serve_app:app"]

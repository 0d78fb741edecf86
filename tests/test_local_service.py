"""The local service starts next to whatever else runs on this machine, and leaves nothing behind."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.local import LocalService, ServiceError, ray_env, serve_config


def listening_beyond_loopback(processes: list[psutil.Process]) -> set[int]:
    """Ports of these processes that other machines can reach."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended since
            found |= {c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return {address.port for address in found if address.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}


def test_it_serves_on_loopback_and_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    service = LocalService(tmp_path / "storage", num_cpus=2, env={"OMP_NUM_THREADS": "1"})
    own_dir = Path(service.env["RAY_TMPDIR"])
    try:
        with service:
            answer = httpx.get(f"{service.url}/healthz", trust_env=False)
            assert answer.json()["status"] == "ok"
            processes = service.processes()
            assert listening_beyond_loopback(processes) == set()
            for name, path in (("STATS", "stats"), ("METRICS", "metrics")):
                port = service.env[f"RAY_SERVE_HAPROXY_{name}_PORT"]
                assert httpx.get(f"http://127.0.0.1:{port}/{path}", trust_env=False).is_success
        assert not any(process.is_running() for process in processes)
        assert not own_dir.exists()
        assert (tmp_path / "storage").exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


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

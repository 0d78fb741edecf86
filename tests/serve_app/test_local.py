"""What `make serve` says where the service can't start."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from events.sqlite import LOG_FILE, lock
from serve_app.local import LocalService, ServiceError, main

UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
DROP_CAP_NET_BIND_SERVICE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 10)  # PR_CAPBSET_DROP; a user who may not do that doesn't have it
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def make_serve(storage: Path, *options: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "serve_app.local", *options],
        env={**os.environ, "TUNEWRIGHT_STORAGE": str(storage)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_storage_that_can_not_be_is_named_to_the_letter(tmp_path: Path) -> None:
    """Brackets of what is printed are not those of the terminal's markup."""
    storage = tmp_path / "jobs[" / "old]"
    storage.parent.mkdir()
    storage.touch()
    done = make_serve(storage)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == f"The service can't start: the storage directory {storage} can't be used: File exists\n"


def test_a_storage_that_another_service_works_in_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    held = lock(tmp_path / f"{LOG_FILE}.lock")
    try:
        done = make_serve(tmp_path)
    finally:
        os.close(held)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == (
        f"The service can't start: another service is running in {tmp_path}: stop it (if it is 'make serve', "
        "with Ctrl-C), or set TUNEWRIGHT_STORAGE to another directory\n"
    )


def first_unprivileged_port() -> int:
    return int(UNPRIVILEGED_PORTS.read_text()) if UNPRIVILEGED_PORTS.exists() else 1024


@pytest.mark.skipif(first_unprivileged_port() < 2, reason="every user may listen on every port")
def test_a_port_that_this_user_may_not_listen_on_is_not_said_to_be_in_use(tmp_path: Path) -> None:
    port = min(first_unprivileged_port() - 1, 1023)
    done = make_serve(tmp_path, f"--port={port}", python=("-c", DROP_CAP_NET_BIND_SERVICE))
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == (
        f"The service can't start: this user may not listen on port {port}: choose a port from 1024 up\n"
    )


def test_a_port_that_is_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = make_serve(tmp_path, f"--port={port}")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == (
        f"The service can't start: port {port} is in use: stop what listens there, or choose another port\n"
    )


@pytest.mark.parametrize("port", ["70000", "0"])
@pytest.mark.parametrize("option", ["--port", "--dashboard-port"])
def test_a_port_that_cannot_be_is_refused_by_the_name_of_its_option(
    option: str, port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_app.local", option, port])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"argument {option}: {port} is not a port: choose one from 1 to 65535" in capsys.readouterr().err


def test_the_api_and_the_dashboard_need_a_port_each(tmp_path: Path) -> None:
    """Else the service waits for three minutes, and doesn't know why it didn't come up."""
    service = LocalService(tmp_path, http_port=8265, dashboard_port=8265)
    with pytest.raises(ServiceError, match="the API and the dashboard can't both have port 8265"):
        service.start()

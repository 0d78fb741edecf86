"""More nodes for a local service, all on this machine. They leave when told to, or are killed without notice."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from serve_app.local import LocalService
from tests.service.conftest import Api
from tests.waiting import WAIT_S, eventually

_NODE = """
import sys
from ray._private.node import Node
from ray._private.parameter import RayParams
node = RayParams(
    gcs_address=sys.argv[1], node_ip_address="127.0.0.1", num_cpus=int(sys.argv[2]), num_gpus=0,
    object_store_memory=100 << 20, node_manager_port=0, min_worker_port=0, max_worker_port=0, include_log_monitor=False,
)
node.dashboard_agent_listen_port = None  # a free one
Node(node, head=False, shutdown_at_exit=True, spawn_reaper=True)
sys.stdin.read()
"""
"""`ray start` refuses a second node on loopback (`RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`); what it calls does not."""


@dataclass(frozen=True)
class AnotherNode:
    node_id: str
    _session: int

    def kill(self) -> None:
        """Sends SIGKILL to every process there, as if its power failed."""
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == self._session:
                    process.send_signal(signal.SIGKILL)


@contextmanager
def another_node(service: LocalService, cpus: int = 1) -> Iterator[AnotherNode]:
    before = nodes(service)
    command = [sys.executable, "-c", _NODE, service.ray_address, str(cpus)]
    with subprocess.Popen(command, env=service.env, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        with process.stdin:  # at its end the node leaves
            eventually(lambda: nodes(service) > before, WAIT_S, lambda: "the node does not join")
            (new,) = nodes(service) - before
            node = AnotherNode(new, process.pid)
            yield node
    node.kill()  # its agents may outlive it


def nodes(service: LocalService) -> set[str]:
    """The ids of the nodes that are alive."""
    answer = httpx.get(service.dashboard_url + "/api/v0/nodes?detail=1", timeout=30, trust_env=False).json()
    return {node["node_id"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"}


def held_by(service: LocalService, job_id: str) -> dict[str, float]:
    """The CPUs of the job's placement group on each node."""
    answer = httpx.get(service.dashboard_url + "/api/v0/placement_groups?detail=1", timeout=30, trust_env=False)
    groups = answer.json()["data"]["result"]["result"]
    held = [group for group in groups if group["name"] == job_id and group["state"] == "CREATED"]
    bundles = [(bundle["node_id"], bundle["unit_resources"]["CPU"]) for group in held for bundle in group["bundles"]]
    assert len(dict(bundles)) == len(bundles)  # a node has one bundle
    return dict(bundles)


def submit_to(api: Api, config: dict[str, Any]) -> str:
    """Submits a job, again until the service knows of its nodes: it asks for the cluster's size every few seconds."""
    answer: httpx.Response | None = None

    def accepted() -> bool:
        nonlocal answer
        answer = api.http.post("/fine_tuning/jobs/submit", json=config)
        return answer.is_success

    eventually(accepted, WAIT_S, lambda: f"refused: {answer and answer.text}")
    assert answer is not None
    job_id: str = answer.json()["job_id"]
    return job_id

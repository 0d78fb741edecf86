"""The Ray cluster as the dispatcher uses it: its capacity, its Ray Jobs and its placement groups.

The only module that calls Ray's control plane. Every method blocks on network calls: callers run them in threads.
"""

import contextlib
import os
import shlex
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import ray
from ray._private import state as ray_state  # free resources by node and draining nodes are not public
from ray._private.services import get_webui_url_from_internal_kv
from ray._raylet import PlacementGroupID
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.dashboard.modules.job.common import JOB_ACTOR_NAME_TEMPLATE, SUPERVISOR_ACTOR_RAY_NAMESPACE
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from trainers.dispatching.admission import Capacity
from trainers.dispatching.autoscaler import Autoscaler, node_of

WATCHED_S = 4.0
"""Seconds until Ray's job manager has noticed that a supervisor is gone: it checks every Ray Job once a second."""

ANSWER_S = 60.0
"""Time-out of a request to the dashboard, which answers within a second unless it is overloaded."""
_NOT_FOUND = "Request failed with status code 404:"
"""Beginning of the message of the RuntimeError that Ray's client raises for a 404; it has no other kind of error."""

RunnerState = Literal["absent", "alive", "stopped", "ended", "unknown"]
"""`unknown`: Ray gave no answer, so `Cluster.runner` raised."""

# Settings of Ray Train and Ray Jobs that a run needs, whatever the cluster was started with. They reach the runner and
# the workers through the Ray Job's runtime_env.
RUN_ENV = {
    "RAY_JOB_STOP_SIGNAL": "SIGINT",  # the runner stops its workers on SIGINT; Ray's SIGTERM handler would exit at once
    "RAY_JOB_STOP_WAIT_TIME_S": "10",  # then SIGKILL; until then the first worker may close its W&B run
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's /api/train/v2/runs/v1 shows the run
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the end of a run is noticed in 0.2 s instead of 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # a shorter wait gives up the group's place in Ray's queue
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process fewer; the dispatcher watches for nodes that are drained
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it, every printed line would appear twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


_ALLOCATION = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def _allocation() -> dict[str, str]:
    """How workers allocate GPU memory, unless the head node's environment says so. Steps differ in width: with segments
    of fixed size, memory that one step has freed may be too fragmented for the next."""
    return {} if any(name in os.environ for name in _ALLOCATION) else {_ALLOCATION[0]: "expandable_segments:True"}


LINGER_S = 10.0
"""Seconds after which `forget_runner` removes the supervisor of an ended Ray Job itself. Ray's job manager needs about
one."""


@dataclass(frozen=True)
class Runner:
    """A runner's Ray Job. `message` is Ray's account of how it ended; `started_ms` (Unix time) tells an ended runner
    from the job's other runners."""

    state: RunnerState
    message: str = ""
    started_ms: int = 0


class _Jobs(JobSubmissionClient):
    """Ray's job client for the dashboard at `url`, with a time-out.

    Ray's own asks the cluster at RAY_API_SERVER_ADDRESS or RAY_ADDRESS instead, where one of these is set, and waits
    for an answer for ever: a dashboard that hangs would end the dispatcher's passes.
    """

    def __init__(self, url: str) -> None:
        SubmissionClient.__init__(self, url)  # not JobSubmissionClient's, which reads the environment

    def _do_request(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  -- as in Ray
        return super()._do_request(*arguments, **{"timeout": ANSWER_S, **options})


class Cluster:
    """The Ray cluster that this process is connected to."""

    def __init__(self) -> None:
        self._to_forget: dict[str, float] = {}  # by job, when it was first asked to be forgotten

    @cached_property
    def _autoscaler(self) -> Autoscaler:
        return Autoscaler(ray.get_runtime_context().gcs_address)

    @cached_property
    def _jobs(self) -> JobSubmissionClient:
        # Not `get_dashboard_url`: in an actor it returns Ray's default port, wherever the dashboard listens (Ray 2.60).
        if not (address := _untyped(get_webui_url_from_internal_kv)()):
            raise ConnectionError("Ray's dashboard has not registered its address yet")
        return _Jobs(f"http://{address}")

    def capacity(self) -> Capacity:
        """Total and free resources of the live nodes, and what the autoscaler may add. A node that is being drained has
        nothing free."""
        alive = [node for node in _untyped(ray).nodes() if node["Alive"]]
        free = _untyped(ray_state).available_resources_per_node()
        draining = ray_state.state.get_draining_nodes()
        return Capacity(
            nodes=tuple(node_of(node["Resources"]) for node in alive),
            free=tuple(node_of(free.get(node["NodeID"], {})) for node in alive if node["NodeID"] not in draining),
            groups=self._autoscaler.groups(),
        )

    def start_runner(self, job_id: str, settings_env: dict[str, str]) -> None:
        """Starts the job's Ray Job. Its submission id is the job id, so Ray refuses a second one."""
        self._jobs.submit_job(
            entrypoint=f"exec {shlex.quote(sys.executable)} -m trainers run {job_id}",
            submission_id=job_id,
            runtime_env={"env_vars": RUN_ENV | _allocation() | settings_env},
            metadata={"job_id": job_id, "service": "tunewright"},
        )

    def runner(self, job_id: str) -> Runner:
        """The job's runner as Ray knows it. Raises RuntimeError or OSError (as requests' errors are) if Ray gives no
        answer."""
        try:
            info = self._jobs.get_job_info(job_id)
        except RuntimeError as error:
            if str(error).startswith(_NOT_FOUND):  # not `in`: a job's id may contain 404
                return Runner("absent")
            raise
        message = info.message or ""
        match info.status:
            case JobStatus.PENDING | JobStatus.RUNNING:
                return Runner("alive", message)
            case JobStatus.STOPPED:
                return Runner("stopped", message)
            case _:
                return Runner("ended", message, info.start_time or 0)

    def stop_runner(self, job_id: str) -> None:
        """Tells the job's Ray Job to stop: SIGINT now, SIGKILL after ten seconds. Returns at once."""
        self._jobs.stop_job(job_id)

    def forget_runner(self, job_id: str) -> bool:
        """Removes an ended Ray Job, so that the job can be started again under the same id. Returns False if it is too
        early for that.

        Ray's job manager checks the supervisor actor of an ended Ray Job once more, a second or two after the actor has
        gone. A new Ray Job with the same id would fail because of that actor's name, or be declared dead with it. If
        Ray does not remove the actor, it is killed here. The wait is measured by a monotonic clock: the end time that
        Ray records is wall-clock time, which may be set back.
        """
        waited_s = time.monotonic() - self._to_forget.setdefault(job_id, time.monotonic())
        name = JOB_ACTOR_NAME_TEMPLATE.format(job_id=job_id)
        with contextlib.suppress(ValueError):  # no such actor any more
            supervisor = ray.get_actor(name, SUPERVISOR_ACTOR_RAY_NAMESPACE)
            if waited_s > LINGER_S:
                ray.kill(supervisor)
            return False
        if waited_s < WATCHED_S:
            return False
        self._jobs.delete_job(job_id)
        del self._to_forget[job_id]
        return True

    def placement_groups(self) -> dict[str, list[tuple[str, str]]]:
        """Existing placement groups as (id, state) pairs, by name: `trainers.running.controller` names them after their
        job."""
        found: dict[str, list[tuple[str, str]]] = {}
        for group_id, group in placement_group_table().items():
            if group["state"] != "REMOVED":
                found.setdefault(group["name"], []).append((group_id, group["state"]))
        return found

    def on_draining_nodes(self) -> frozenset[str]:
        """Jobs (names of placement groups) that hold resources on a node that is being drained: reclaimed by the cloud,
        removed by the autoscaler, or drained with `ray drain-node`."""
        draining = ray_state.state.get_draining_nodes()
        if not draining:
            return frozenset()
        return frozenset(
            group["name"]
            for group in placement_group_table().values()
            if group["state"] == "CREATED" and not draining.keys().isdisjoint(group["bundles_to_node_id"].values())
        )

    def remove_placement_group(self, group_id: str) -> None:
        """Frees a group whose runner is gone. Ray kills the workers that still run in it."""
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))


def _untyped(module: Any) -> Any:  # noqa: ANN401  -- that is the point
    """The argument as Any: Ray's functions without annotations may not be called otherwise (mypy --strict)."""
    return module

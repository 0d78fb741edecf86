"""What the dispatcher knows of the Ray cluster: its capacity, its Ray Jobs and its placement groups.

The only module that asks Ray's control plane. Every function blocks on network calls: callers run them in threads.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import ray
from ray._private import state as ray_state  # free resources by node and the autoscaler's groups are not public
from ray._private.services import get_webui_url_from_internal_kv
from ray._raylet import PlacementGroupID
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.dashboard.modules.job.common import JOB_ACTOR_NAME_TEMPLATE, SUPERVISOR_ACTOR_RAY_NAMESPACE
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from trainers.dispatching.admission import Capacity
from trainers.dispatching.autoscaler import Autoscaler, node_of

WATCHED_S = 4.0
"""Ray's job manager looks at every job once a second."""

ANSWER_S = 60.0
"""The dashboard answers within a second, unless it is overloaded."""
_NOT_FOUND = "Request failed with status code 404:"
"""How Ray's client begins its only kind of error."""

RunnerState = Literal["absent", "alive", "stopped", "ended", "unknown"]
"""`unknown`: Ray did not say. `Cluster.runner` raises then."""

# What a run needs of Ray Train and of Ray Jobs, whatever the cluster was started with. They reach the runner
# and the workers through the Ray Job's runtime_env.
RUN_ENV = {
    "RAY_JOB_STOP_SIGNAL": "SIGINT",  # the runner stops its workers on SIGINT; Ray's SIGTERM handler would exit at once
    "RAY_JOB_STOP_WAIT_TIME_S": "10",  # before SIGKILL; its workers may have to tell W&B that they were stopped
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's /api/train/v2/runs/v1 shows the run
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the end of a run is noticed in 0.2 s instead of 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # a shorter wait gives up the group's place in Ray's queue
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less; the runner handles interruptions itself
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # every print would come out twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


_ALLOCATION = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def _allocation() -> dict[str, str]:
    """How workers manage a GPU's memory, unless the head node's environment says. Steps differ in width: what one
    leaves of fixed segments may not fit the next."""
    return {} if any(name in os.environ for name in _ALLOCATION) else {_ALLOCATION[0]: "expandable_segments:True"}


LINGER_S = 10.0
"""Longer than Ray's job manager needs to remove the supervisor of a Ray Job that ended (about a second)."""


@dataclass(frozen=True)
class Runner:
    """A Ray Job as the dispatcher sees it. `message` is Ray's own account of how it ended; `started_ms` (Unix time)
    tells one that ended from the others of its job."""

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
    """The Ray cluster this process is connected to."""

    def __init__(self) -> None:
        self._to_forget: dict[str, float] = {}  # since when, by job

    @cached_property
    def _autoscaler(self) -> Autoscaler:
        return Autoscaler(ray.get_runtime_context().gcs_address)

    @cached_property
    def _jobs(self) -> JobSubmissionClient:
        # Not `get_dashboard_url`: in an actor that is Ray's default port, wherever the dashboard listens (Ray 2.60).
        return _Jobs(f"http://{_untyped(get_webui_url_from_internal_kv)()}")

    def capacity(self) -> Capacity:
        """Totals and free resources of the alive nodes, and what the autoscaler may add. A node that is being drained
        has nothing free."""
        alive = [node for node in _untyped(ray).nodes() if node["Alive"]]
        free = _untyped(ray_state).available_resources_per_node()
        draining = ray_state.state.get_draining_nodes()
        return Capacity(
            nodes=tuple(node_of(node["Resources"]) for node in alive),
            free=tuple(node_of(free.get(node["NodeID"], {})) for node in alive if node["NodeID"] not in draining),
            groups=self._autoscaler.groups(),
        )

    def start_runner(self, job_id: str, settings_env: dict[str, str]) -> None:
        """Start the job's Ray Job. Its submission id is the job id, so a second one can't be started beside it."""
        self._jobs.submit_job(
            entrypoint=f"exec {sys.executable} -m trainers run {job_id}",
            submission_id=job_id,
            runtime_env={"env_vars": RUN_ENV | _allocation() | settings_env},
            metadata={"job_id": job_id, "service": "tunewright"},
        )

    def runner(self, job_id: str) -> Runner:
        try:
            info = self._jobs.get_job_info(job_id)
        except RuntimeError as error:
            if str(error).startswith(_NOT_FOUND):  # any other message may well hold a job's id, and that the digits 404
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
        """Ask the job's Ray Job to stop: SIGINT now, SIGKILL after ten seconds. Returns at once."""
        self._jobs.stop_job(job_id)

    def forget_runner(self, job_id: str) -> bool:
        """Remove an ended Ray Job, so that the job can be started again under the same id. False: it is too early.

        Ray's job manager looks at the supervisor actor of an ended job once more, a second or two after the actor has
        gone: a new Ray Job of the same id would fail on that actor's name, or be declared dead with it. An actor that
        Ray does not remove is removed here. The time is taken here, too: Ray's, of the end of a job, is by the wall
        clock, which may be set back.
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
        """Placement groups that exist, by name (`controller` names them after their job): (id, state) pairs."""
        found: dict[str, list[tuple[str, str]]] = {}
        for group_id, group in placement_group_table().items():
            if group["state"] != "REMOVED":
                found.setdefault(group["name"], []).append((group_id, group["state"]))
        return found

    def on_draining_nodes(self) -> frozenset[str]:
        """The jobs, by the names of their placement groups, that hold something on a node that is about to go: one a
        cloud takes back, one the autoscaler removes, or `ray drain-node`."""
        draining = ray_state.state.get_draining_nodes()
        if not draining:
            return frozenset()
        return frozenset(
            group["name"]
            for group in placement_group_table().values()
            if group["state"] == "CREATED" and not draining.keys().isdisjoint(group["bundles_to_node_id"].values())
        )

    def remove_placement_group(self, group_id: str) -> None:
        """Free a group whose runner is gone; Ray kills whatever still runs in it."""
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))


def _untyped(module: Any) -> Any:  # noqa: ANN401  -- that is the point
    """Ray's functions without annotations, for a type checker that refuses to call them."""
    return module

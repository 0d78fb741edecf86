"""Puts the job's id on what Ray Train creates without names: the controller, the workers, the placement group.

The dashboard then shows it on its Actors and Placement Groups pages, and the dispatcher finds a job's group by name.
Ray Train 2.60 has no option for any of this, so private names are replaced: in the runner (the controller), and in the
controller's process (workers, group). A test on a real cluster holds them to it.
"""

import functools
import logging
from typing import Any

import ray
import ray.exceptions
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroupContext, worker_group
from ray.train.v2._internal.state.state_actor import get_state_actor
from ray.train.v2.api import data_parallel_trainer

logger = logging.getLogger(__name__)

_STATE_TIMEOUT_S = 30.0


class NameAfterJob(WorkerGroupCallback):
    """Applies to every run that is started with it as a callback. One per process: the names it sets stay."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        module: Any = data_parallel_trainer
        if not _is_named(module.TrainController, job_id):
            module.TrainController = _named(module.TrainController, job_id)

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """Runs in the controller's process, before the placement group is asked for."""
        module: Any = worker_group
        workers = module.WorkerGroup
        if not _is_named(workers._worker_cls, self._job_id):
            workers._worker_cls = _named(workers._worker_cls, self._job_id)
            module.placement_group = functools.partial(module.placement_group, name=self._job_id)


def take_over_runs(job_id: str) -> None:
    """Files the Train runs of the job's earlier attempts under the driver that runs this one.

    Of a submission with several drivers the dashboard knows the last one only, and it answers a list with a run of an
    unknown driver (/api/train/v2/runs/v1) with 500: one job that was resumed would hide the runs of all.
    """
    state: Any = get_state_actor()
    if state is None:  # no run yet in this cluster, or state tracking is off
        return
    driver = ray.get_runtime_context().get_job_id()
    try:
        for run in ray.get(state.get_train_runs.remote(), timeout=_STATE_TIMEOUT_S).values():
            if run.name == job_id and run.job_id != driver:
                run.job_id = driver
                ray.get(state.create_or_update_train_run.remote(run), timeout=_STATE_TIMEOUT_S)
    except ray.exceptions.RayError:  # what the dashboard shows is not worth an attempt
        logger.warning("the earlier runs of %s keep their driver in Ray Train's state", job_id, exc_info=True)


def _named(cls: type, job_id: str) -> type:
    """A subclass that shows as `Class:job_id`. Made here, it has no importable path, so it is pickled by value."""
    name = f"{cls.__name__}:{job_id}"
    return type(name, (cls,), {"__module__": "__main__", "__repr__": lambda self: name})


def _is_named(cls: type, job_id: str) -> bool:
    return cls.__name__.endswith(f":{job_id}")

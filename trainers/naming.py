"""Puts the job's id on what Ray Train creates without names: the controller, the workers, the placement group.

The dashboard then shows it on its Actors and Placement Groups pages, and the dispatcher finds a job's group by name.
Ray Train 2.60 has no option for any of this, so private names are replaced: in the runner (the controller), and in the
controller's process (workers, group). A test on a real cluster holds them to it.
"""

import functools
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroupContext, worker_group
from ray.train.v2.api import data_parallel_trainer


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


def _named(cls: type, job_id: str) -> type:
    """A subclass that shows as `Class:job_id`. Made here, it has no importable path, so it is pickled by value."""
    name = f"{cls.__name__}:{job_id}"
    return type(name, (cls,), {"__module__": "__main__", "__repr__": lambda self: name})


def _is_named(cls: type, job_id: str) -> bool:
    return cls.__name__.endswith(f":{job_id}")

"""Puts the job's id on what Ray Train creates without names: the controller, the workers, the placement group.

The dashboard then shows the id on its Actors and Placement Groups pages, and the dispatcher finds a job's group by
name. Ray Train 2.60 has no option for any of this, so private names are replaced in the runner (the controller) and in
the controller's process (workers, group); a test on a real cluster holds them to it.
"""

import functools
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroupContext, worker_group
from ray.train.v2.api import data_parallel_trainer


def _named(cls: type, name: str) -> type:
    """A subclass that shows as `name`. Made here, it has no importable path, so it is pickled by value."""
    return type(
        f"{cls.__name__}:{name}", (cls,), {"__module__": "__main__", "__repr__": lambda self: f"{cls.__name__}:{name}"}
    )


class NameAfterJob(WorkerGroupCallback):
    """Names the worker group. Create it in the process that calls fit(): it names the controller at once."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        controller: Any = data_parallel_trainer
        controller.TrainController = _named(controller.TrainController, job_id)

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """Runs in the controller's process, before the placement group is asked for. Harmless when run twice."""
        module: Any = worker_group
        if not isinstance(module.placement_group, functools.partial):
            module.placement_group = functools.partial(module.placement_group, name=self._job_id)
            cls = module.WorkerGroup
            cls._worker_cls = _named(cls._worker_cls, self._job_id)

"""Runs Ray Train's controller in the runner's own process, without the helper processes that this service doesn't need.

Ray Train 2.60 starts up to five processes for a run beside its workers. Each imports Ray Train, which takes seconds and
some 200 MiB. Of these,

- the controller runs here: only the runner waits for it, and neither can go on without the other;
- the synchronization actor is for `ray.train.report` and `ray.train.collective`, which are not called;
- the dataset manager is for Ray Data;
- the placement group cleaner is for a controller that dies without its driver (here the group belongs to the driver,
  and Ray removes it with the Ray Job);
- the preemption watcher is switched off by a setting (`trainers.dispatching.cluster.RUN_ENV`).

The workers and the placement group, which Ray Train leaves unnamed, get the job's id as their name: the dashboard shows
it on its Actors and Placement Groups pages, and the dispatcher finds a job's group by it.

Ray has no options for any of this, so private methods are overridden and a few private names replaced. Tests on a real
cluster cover all of them.
"""

import asyncio
import contextlib
import logging
import logging.config
import warnings
from typing import Any

import ray
import ray.exceptions
from ray.dashboard.modules.job.common import JOB_ACTOR_NAME_TEMPLATE, SUPERVISOR_ACTOR_RAY_NAMESPACE
from ray.train.v2._internal.callbacks import state_manager
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import AbortedState
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, Worker, WorkerGroup, worker_group
from ray.train.v2._internal.execution.worker_group import state as worker_group_state
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.logging import LoggingManager
from ray.train.v2._internal.state.state_actor import get_state_actor
from ray.train.v2._internal.state.state_manager import TrainStateManager
from ray.train.v2.api.result import Result
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.annotations import RayDeprecationWarning

from trainers.replacing import replace
from trainers.running.worker import LEAVE_S, leave
from trainers.training.loggers import End

logger = logging.getLogger(__name__)

_STATE_TIMEOUT_S = 30.0


class Trainer(TorchTrainer):
    """A TorchTrainer whose `fit()` controls the workers from the calling thread. SIGINT ends it with KeyboardInterrupt.
    If the process ends in another way, Ray ends the workers and frees their group.

    The workers are placed in equal shares on exactly `nodes` nodes, as torchrun's --nnodes means it: the placement
    group has one bundle for each node's share. (With one bundle for each worker, Ray would spread them only as evenly
    as it can.)
    """

    def __init__(self, *arguments: Any, nodes: int, **options: Any) -> None:  # noqa: ANN401  -- as in Ray
        super().__init__(*arguments, **options)
        self._nodes = nodes

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:  # noqa: ANN401  -- as in Ray
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)  # of its own parts
            controller: Any = _controller_of(str(self.run_config.name), self._nodes)(**parts)
        # Not asyncio.run: its SIGINT handler cancels the task, which doesn't interrupt a blocking call in it.
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            try:
                loop.run_until_complete(controller.run())
            except KeyboardInterrupt:
                _stop(controller)
                raise
        result: Result = controller.get_result()
        return result


def take_over_runs(job_id: str) -> None:
    """Assigns the Train runs of the job's earlier attempts to this driver, in Ray Train's state.

    The dashboard knows only the last driver of a submission id, and answers GET /api/train/v2/runs/v1 with 500 if a
    run's driver is unknown: one resumed job would hide the runs of all jobs.
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
    except ray.exceptions.RayError:  # it concerns only the dashboard, so the attempt goes on
        logger.warning("the earlier runs of %s keep their driver in Ray Train's state", job_id, exc_info=True)


def _controller_of(job_id: str, nodes: int) -> type[TrainController]:
    class Workers(WorkerGroup):
        _worker_cls: Any = _named(RayTrainWorker, job_id)

        def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:  # noqa: ANN401
            per_node = worker_group_context.num_workers // nodes
            share = {name: per_node * amount for name, amount in worker_group_context.resources_per_worker.items()}
            group = ray.util.placement_group([share] * nodes, strategy="STRICT_SPREAD", name=job_id)
            return DefaultPlacementGroupHandle(group)

        def _create_workers(self, num_workers: int, *arguments: Any, **options: Any) -> list[Any]:  # noqa: ANN401
            bundles = [worker * nodes // num_workers for worker in range(num_workers)]
            options["placement_group_bundle_indices"] = bundles
            workers: list[Any] = super()._create_workers(num_workers, *arguments, **options)
            return workers

        def _init_train_context_on_workers(
            self, workers: list[Any], sync_actor: object, train_context_args: dict[str, list[Any]]
        ) -> None:
            ray.get(
                [
                    worker.actor.init_train_context.remote(
                        train_run_context=self._train_run_context,
                        distributed_context=worker.distributed_context,
                        synchronization_actor=None,
                        storage_context=self._storage_context,
                        worker_callbacks=self._worker_callbacks_to_propagate,
                        controller_actor=None,
                        **{name: of_workers[i] for name, of_workers in train_context_args.items()},
                    )
                    for i, worker in enumerate(workers)
                ]
            )
            self._decorate_worker_log_file_paths(workers)

        def shutdown(self) -> None:
            _let_leave(self, "failed")  # without effect on a worker that has closed its logger
            super().shutdown()  # type: ignore[no-untyped-call]

        def abort(self) -> None:
            _let_leave(self, "cancelled")
            super().abort()  # type: ignore[no-untyped-call]

    class Controller(TrainController):
        worker_group_cls = Workers

    return Controller


def _let_leave(group: WorkerGroup, end: End) -> None:
    """Gives the first worker time to close its logger and send its last lines, before Ray kills all workers."""
    if not group.has_started():
        return
    try:
        first: Any = group.get_workers()[0].actor
        ray.get(first.execute.remote(leave, end), timeout=LEAVE_S + 1)
    except ray.exceptions.RayError as error:  # the worker has died, or hangs
        logger.info("the first worker could not say that its run was %s: %s", end, error)


def _stop(controller: Any) -> None:  # noqa: ANN401  -- partly untyped in Ray
    """Ends the workers, and tells the dashboard. If it fails, Ray ends the workers once this process has ended."""
    try:
        if group := controller.get_worker_group():
            group.abort()
        controller._set_state(AbortedState())  # type: ignore[no-untyped-call]
    except Exception:  # the process has to end in any case
        logger.warning("the run was stopped before its workers", exc_info=True)


def _log_to_files(context: TrainRunContext) -> None:
    """Keeps Ray Train's log of the run in Ray's log directory only: this process's standard output is the job's log."""
    config = LoggingManager._get_controller_logger_config_dict(context)
    config["loggers"]["ray.train"]["handlers"].remove("console")
    logging.config.dictConfig(config)


def _named(cls: type, job_id: str) -> type:
    """A subclass that Ray shows as `Class:job_id`. It can't be imported by a path, so it is pickled by value."""
    name = f"{cls.__name__}:{job_id}"
    return type(name, (cls,), {"__module__": "__main__", "__repr__": lambda self: name})


def _kill(workers: list[Worker], **_options: float) -> None:
    """In place of Ray Train's `_shutdown_workers`, which first calls each worker's shutdown hooks and waits up to five
    seconds for one that hangs: a runner that has been told to stop has ten seconds in all, and `_let_leave` may have
    taken five. The only hook zeroes metrics of the worker, which go with its process."""
    for worker in workers:
        ray.kill(worker.actor)


class _StateManager(TrainStateManager):
    """Names the supervisor of the Ray Job as a run's controller actor: it lives as long as this process does. Once the
    controller actor is dead, Ray Train's state takes the run for aborted."""

    def create_train_run(self, **facts: Any) -> None:  # type: ignore[override]  # noqa: ANN401  -- called by keyword
        name = JOB_ACTOR_NAME_TEMPLATE.format(job_id=facts["name"])
        supervisor = ray.get_actor(name, SUPERVISOR_ACTOR_RAY_NAMESPACE)
        super().create_train_run(**facts | {"controller_actor_id": supervisor._actor_id.hex()})


class _NoActor:
    """In place of SynchronizationActor; it starts no actor."""

    def options(self, **_options: Any) -> "_NoActor":  # noqa: ANN401  -- as in Ray
        return self

    def remote(self, **_arguments: Any) -> "_NoActor":  # noqa: ANN401  -- as in Ray
        return self


replace(LoggingManager, "configure_controller_logger", staticmethod(_log_to_files))
replace(state_manager, "TrainStateManager", _StateManager)
replace(worker_group, "SynchronizationActor", _NoActor())
replace(worker_group_state, "_shutdown_workers", _kill)
replace(worker_group_state, "_shutdown_sync_actor", lambda _actor: None)

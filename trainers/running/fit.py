"""One attempt: a Ray Train run on a placement group of its own, and the meaning of its end.

Ray Train itself restarts nothing (max_failures=0), since it would treat all failures alike. Here, a fault of the user
ends the job, and a lost worker sends it back to the queue, where it is admitted and resumed like any other job.
"""

from pathlib import Path

import ray.exceptions
from ray.train.torch import TorchConfig
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from events.facts import Resources
from events.log import LogUnavailable
from trainers.errors import REPORT, CapacityError, InfrastructureError, JobProblem, storage_away, storage_full
from trainers.running.controller import Trainer, take_over_runs
from trainers.running.tenure import Superseded
from trainers.running.worker import FINISHED, PAUSED, Assignment, train_worker
from trainers.training.reporting import Paused


class Interrupted(Exception):
    """The attempt was cut short by the infrastructure; another one may go on from the last checkpoint."""


def fit(assignment: Assignment, resources: Resources) -> None:
    """Trains to the end. Blocks, also while the placement group waits for resources.

    Must be called on the main thread, so that SIGINT can end it (with KeyboardInterrupt).

    Raises Interrupted, Paused, Superseded, or the JobProblem that ends the job.
    """
    trainer = Trainer(
        train_worker,
        nodes=resources.nodes,
        train_loop_config=assignment.as_dict(),
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_bundle(resources),
        ),
        run_config=RunConfig(
            name=assignment.job_id,
            storage_path=str(Path(assignment.job_dir) / "ray"),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )
    if assignment.attempt > 1:
        take_over_runs(assignment.job_id)
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        raise cause_of(error.worker_failures) from error
    except ControllerError as error:
        raise Interrupted(f"Ray Train's controller failed: {error.controller_failure}") from error
    except ray.exceptions.RayError as error:
        raise Interrupted(f"the run could not be started: {_first_line(error)}") from error
    outcome = getattr(result, "return_value", None)
    if outcome == PAUSED:
        raise Paused
    if outcome != FINISHED:
        raise Interrupted("the run ended before its last step")


def _bundle(resources: Resources) -> dict[str, float]:
    bundle = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        bundle["GPU"] = resources.gpus_per_worker
    return bundle


def cause_of(failures: dict[int, Exception]) -> Exception:
    """The error that the workers' failures, by rank, amount to. When one rank dies, the others fail as well, in
    collective calls: the order of the rules tells the cause from its consequences."""
    causes = {rank: _unwrapped(failure) for rank, failure in sorted(failures.items())}
    for rank, cause in causes.items():
        if isinstance(cause, JobProblem):
            return cause.placed(rank=rank)
        if isinstance(cause, Superseded):
            return cause
    for rank, cause in causes.items():
        if isinstance(cause, ray.exceptions.OutOfMemoryError):
            return CapacityError(
                "out_of_memory",
                f"rank {rank} was killed because its node ran out of memory",
                param="fine_tuning_options.batch_size",
                suggestion="lower batch_size or max_seq_len, set enable_activation_checkpointing, or use LoRA",
            ).placed(rank=rank)
    for rank, cause in causes.items():
        if (full := storage_full(cause)) is not None:
            return full.placed(rank=rank)
    for rank, cause in causes.items():
        if isinstance(cause, _DEATHS):
            return Interrupted(f"rank {rank} died: {_first_line(cause)}")
        if isinstance(cause, LogUnavailable):
            return Interrupted(f"rank {rank} could not reach the log for too long: {_first_line(cause)}")
        if _lost_device(cause):
            return Interrupted(f"rank {rank} lost its GPU: {_first_line(cause)}")
        if storage_away(cause):
            return Interrupted(f"rank {rank} could not reach the storage: {_first_line(cause)}")
    # If a worker died with its node, Ray may not know yet when the others have lost their connection to it.
    rank, cause = next((one for one in causes.items() if not _lost_connection(one[1])), next(iter(causes.items())))
    if _lost_connection(cause):
        return Interrupted(f"rank {rank} lost its connection to the others: {_first_line(cause)}")
    problem = InfrastructureError(
        "training_error",
        f"rank {rank}: {type(cause).__name__}: {_first_line(cause)}",
        suggestion=REPORT,
        retryable=False,
    )
    problem.__cause__ = failures[rank]
    return problem.placed(rank=rank)


_DEATHS = (ray.exceptions.RayActorError, WorkerHealthCheckTimeoutError)


def _unwrapped(failure: Exception) -> BaseException:
    match failure:
        case UserExceptionWithTraceback():
            return failure._base_exc
        case WorkerHealthCheckFailedError():  # how Ray reports a worker that died
            return failure.health_check_failure
        case _:
            return failure


def _lost_device(cause: BaseException) -> bool:
    """Whether a GPU failed (its memory, its bus, another process on it), rather than the program that it ran. The error
    is recognised by its name, because a job's driver doesn't import torch."""
    told = _first_line(cause)
    failed = type(cause).__name__ == "AcceleratorError" or told.startswith("CUDA error:")
    return failed and not any(words in told for words in ("device-side assert", "no kernel image", "out of memory"))


def _lost_connection(cause: BaseException) -> bool:
    """Whether a collective call broke off. nccl's errors have types of their own; gloo's are RuntimeErrors whose
    message begins with a path in gloo's source."""
    if type(cause).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(cause, RuntimeError) and "/gloo/" in _first_line(cause)


def _first_line(error: BaseException) -> str:
    """The first line of its message, without the full stop: it becomes part of a sentence."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first.removesuffix(".")

"""What the end of a Ray Train run means for the job."""

import errno
from pathlib import Path

import pytest
import ray.exceptions
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from events.log import LogUnavailable
from tests.full_disk import full_disk
from trainers.errors import CapacityError, InfrastructureError, JobProblem, UserError
from trainers.models.export_files import write_safetensors
from trainers.running.fit import Interrupted, cause_of
from trainers.running.tenure import Superseded

KILLED = WorkerHealthCheckFailedError(
    "Worker 0 failed", ray.exceptions.RayActorError(error_msg="The actor died. A root cause may be SIGKILL.")
)
DIVERGED = UserExceptionWithTraceback(UserError("loss_not_finite", "the loss is nan"), "Traceback ...")
COLLATERAL = UserExceptionWithTraceback(
    RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711"),
    "Traceback ...",
)


def test_a_fault_of_the_user_ends_the_job_also_when_it_took_the_other_ranks_down() -> None:
    cause = cause_of({0: COLLATERAL, 1: DIVERGED})
    assert isinstance(cause, JobProblem)
    assert (cause.error.code, cause.error.rank) == ("loss_not_finite", 1)


@pytest.mark.parametrize("failures", [{0: KILLED}, {0: COLLATERAL, 1: KILLED}])
def test_a_lost_worker_interrupts_the_run_whatever_the_others_say(failures: dict[int, Exception]) -> None:
    cause = cause_of(failures)
    assert isinstance(cause, Interrupted)
    assert not str(cause).endswith(".")  # "..., waiting to resume" follows


def test_a_node_that_vanished_before_ray_noticed_interrupts_the_run() -> None:
    cause = cause_of({0: COLLATERAL, 2: COLLATERAL})
    assert isinstance(cause, Interrupted)
    assert "Connection closed by peer" in str(cause)


def test_an_error_is_not_taken_for_a_lost_connection_because_another_rank_lost_its() -> None:
    cause = cause_of({0: COLLATERAL, 1: UserExceptionWithTraceback(KeyError("layers.0"), "Traceback ...")})
    assert isinstance(cause, InfrastructureError)
    assert (cause.error.code, cause.error.rank) == ("training_error", 1)


def test_a_log_that_was_away_for_too_long_interrupts_the_run() -> None:
    cause = cause_of({0: UserExceptionWithTraceback(LogUnavailable("no answer in time"), "Traceback ...")})
    assert isinstance(cause, Interrupted)


def test_a_worker_that_ray_killed_for_memory_says_what_to_change() -> None:
    out_of_memory: type[Exception] = ray.exceptions.OutOfMemoryError
    killed = WorkerHealthCheckFailedError("Worker 1 failed", out_of_memory("killed"))
    cause = cause_of({0: COLLATERAL, 1: killed})
    assert isinstance(cause, CapacityError)
    assert (cause.error.code, cause.error.rank, cause.error.fault) == ("out_of_memory", 1, "capacity")
    assert "batch_size" in (cause.error.suggestion or "")


def test_an_attempt_that_was_replaced_is_neither_a_failure_nor_an_interruption() -> None:
    replaced = UserExceptionWithTraceback(Superseded("job ftjob-1 is queued"), "Traceback ...")
    assert isinstance(cause_of({0: replaced, 1: COLLATERAL}), Superseded)


def written_to_a_full_disk(folder: Path) -> Exception:
    with full_disk(), pytest.raises(Exception, match="File too large") as caught:
        write_safetensors({"a": torch.zeros(1000)}, folder / "a.safetensors")
    return caught.value


def test_a_checkpoint_that_finds_no_room_is_the_storage_s_fault_and_says_how_to_go_on(tmp_path: Path) -> None:
    for error in (written_to_a_full_disk(tmp_path), OSError(errno.ENOSPC, "No space left on device")):
        cause = cause_of({0: UserExceptionWithTraceback(error, "Traceback ..."), 1: COLLATERAL, 2: KILLED})
        assert isinstance(cause, InfrastructureError)
        assert (cause.error.code, cause.error.rank, cause.error.retryable) == ("storage_full", 0, True)
        assert "/fine_tuning/jobs/resubmit" in (cause.error.suggestion or "")


@pytest.mark.parametrize(("number", "away"), [(errno.EIO, True), (errno.ESTALE, True), (errno.ENOENT, False)])
def test_a_storage_that_does_not_answer_interrupts_the_run_but_not_what_is_missing_there(
    number: int, away: bool
) -> None:
    cause = cause_of({0: COLLATERAL, 1: UserExceptionWithTraceback(OSError(number, "..."), "Traceback ...")})
    assert isinstance(cause, Interrupted) == away


def test_an_unknown_error_is_ours_and_is_not_tried_again() -> None:
    cause = cause_of({0: UserExceptionWithTraceback(KeyError("layers.0"), "Traceback ...")})
    assert isinstance(cause, InfrastructureError)
    assert "KeyError" in cause.error.message
    assert (cause.error.rank, cause.error.retryable) == (0, False)


@pytest.mark.parametrize(
    ("says", "lost"),
    [
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
    ],
)
def test_a_run_whose_gpu_failed_is_interrupted_but_not_one_that_fails_on_any_gpu(says: str, lost: bool) -> None:
    cause = cause_of({0: UserExceptionWithTraceback(torch.AcceleratorError(says), "Traceback ...")})
    assert isinstance(cause, Interrupted) == lost

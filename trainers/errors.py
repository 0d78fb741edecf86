"""The errors a job can end with, and the errors of a request. All survive pickling, so they may cross Ray."""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from events.facts import JobError
from trainers.settings import ERROR_FILE

logger = logging.getLogger("tunewright.errors")

REPORT = "the traceback is in the job's error.txt: give it to whoever runs the service"
"""The suggestion for an error that nobody foresaw."""
AGAIN = (
    "submit it again, or go on from its last checkpoint with /fine_tuning/jobs/resubmit; a larger --max-restarts "
    "allows more interruptions"
)
"""The suggestion for a job that was interrupted too often."""


class JobProblem(Exception):
    """Root of everything that ends a job. `error` is what the job will show; its `fault` says who can act."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error)
        self.error = error

    @staticmethod
    def of(error: JobError) -> "JobProblem":
        """The problem that shows this error."""
        kinds = {"user": UserError, "capacity": CapacityError, "infrastructure": InfrastructureError}
        return _rebuilt(kinds[error.fault], {"error": error})

    def __str__(self) -> str:
        return self.error.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.__dict__)

    def placed(self, *, param: str | None = None, rank: int | None = None) -> Self:
        """This problem, which now knows the field of the request and the worker, unless it knew better."""
        given = {"param": param, "rank": rank}
        self.error = self.error.model_copy(
            update={name: value for name, value in given.items() if getattr(self.error, name) is None}
        )
        return self


def _rebuilt(kind: type[JobProblem], state: dict[str, Any]) -> JobProblem:
    problem = kind.__new__(kind, state["error"])
    problem.__dict__.update(state)
    return problem


def _error(code: str, message: str, suggestion: str | None, **rest: Any) -> JobError:  # noqa: ANN401 -- its fields
    """Its message ends with the suggestion."""
    if suggestion is not None and message.endswith("."):
        message = f"{message} {suggestion[:1].upper()}{suggestion[1:]}."
    elif suggestion is not None:
        message = f"{message}: {suggestion}"
    return JobError(code=code, message=message, suggestion=suggestion, **rest)


class UserError(JobProblem):
    """The request, the data or the model is to blame: trying again unchanged can't help, unless it is `retryable`.

    `suggestion` reads on after the message and a colon, or is a sentence after one; it has no full stop of its own.
    """

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        *,
        suggestion: str | None = None,
        rank: int | None = None,
        line: int | None = None,
        retryable: bool = False,
    ) -> None:
        place = {"param": param, "rank": rank, "line": line}
        super().__init__(_error(code, message, suggestion, fault="user", retryable=retryable, **place))


class CapacityError(JobProblem):
    """The job needs more than a machine has: a smaller job helps, or a larger machine; trying again unchanged can't."""

    def __init__(self, code: str, message: str, param: str | None = None, *, suggestion: str) -> None:
        super().__init__(_error(code, message, suggestion, fault="capacity", retryable=False, param=param))


class InfrastructureError(JobProblem):
    """The machines are to blame: the same job may well succeed another time, unless it is not `retryable`."""

    def __init__(self, code: str, message: str, *, suggestion: str, retryable: bool = True) -> None:
        super().__init__(_error(code, message, suggestion, fault="infrastructure", retryable=retryable))


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def errno_of(error: BaseException) -> int | None:
    """The number of an operating system's error; None: it is another one. Of safetensors' only the message has it."""
    if isinstance(error, OSError):
        return error.errno
    told = _OS_ERROR.search(str(error))
    return int(told[1]) if told else None


def storage_full(error: BaseException) -> InfrastructureError | None:
    """The problem that `error` is a sign of, where the storage takes no more; None: it says something else."""
    if errno_of(error) not in _FULL:
        return None
    return InfrastructureError(
        "storage_full",
        f"the storage is full, or a quota is reached: {error}",
        suggestion="once there is room in TUNEWRIGHT_STORAGE, go on from the job's last checkpoint with "
        "/fine_tuning/jobs/resubmit, or submit it again",
    )


def storage_away(error: BaseException) -> bool:
    """Whether it says that a disk, or the network to it, doesn't work just now."""
    return errno_of(error) in _AWAY


def storage_problem(error: BaseException) -> InfrastructureError | None:
    """The problem that `error` is a sign of, where the storage is to blame; None: it says something else."""
    if not storage_away(error):
        return storage_full(error)
    return InfrastructureError(
        "storage_unreachable",
        f"the storage can't be read or written: {error}",
        suggestion="have the disk of TUNEWRIGHT_STORAGE checked; once it works, submit the job again, or go on from "
        "its last checkpoint with /fine_tuning/jobs/resubmit",
    )


@contextmanager
def storage_errors() -> Iterator[None]:
    """Makes a `storage_problem` of an OSError that is one."""
    try:
        yield
    except OSError as error:
        if (problem := storage_problem(error)) is None:
            raise
        raise problem from error


def memory_short(error: BaseException) -> bool:
    """Whether memory didn't suffice, of a GPU or of the host. Not all of torch's own errors say it by their type: not
    those of the CPU's allocator, of pinned memory, of the buffers of nccl and cuBLAS."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch may not be imported
    return named or any(words in str(error) for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))


_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)(?:[^/@\s]*@)?([^?\s'\"]*)(?:\?[^\s'\"]*)?")


def without_secrets(text: str) -> str:
    """The text with its URLs cut to scheme, host and path: without passwords, and without queries, where signatures
    stand."""
    return _URL.sub(r"\1\2", text)


def write_details(text: str, job_dir: Path) -> str | None:
    """Puts all that is known of a failure where every failed job has its details; returns the file's URI. None where
    the storage doesn't take it: a job must be able to end on a full disk.

    Libraries put the URLs they were refused into their errors: those go in `without_secrets`."""
    path = job_dir / ERROR_FILE
    try:
        job_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(without_secrets(text) + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        logger.warning("%s can't be written: %s", path, error)
        return None
    return path.as_uri()


MOST_PROBLEMS = 100
"""More problems of one kind are counted, not told: finding words for each takes time, and nobody reads them."""
LONGEST_NAME = 200
"""Characters of a field's dotted path that an error repeats: a key of the request may be as long as the request."""


class Problem(NamedTuple):
    """One thing wrong with a request. `param` is the dotted path of the field, None when it is no single field."""

    param: str | None
    message: str
    code: str = "invalid_value"


class ConfigProblems(Exception):
    """Everything that is wrong with a request, found in one go (see MOST_PROBLEMS). Never empty."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(f"{p.param}: {p.message}" if p.param else p.message for p in self.problems)

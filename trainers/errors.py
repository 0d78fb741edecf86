"""The errors that can end a job, and the errors of a request. All can be pickled, so Ray can pass them on."""

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
"""The suggestion for an unexpected error."""
AGAIN = (
    "submit it again, or go on from its last checkpoint with /fine_tuning/jobs/resubmit; a larger --max-restarts "
    "allows more interruptions"
)
"""The suggestion for a job that was interrupted too often."""


class JobProblem(Exception):
    """Base class of the errors that end a job. `error` is what the job will show; its `fault` says who can act."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error)
        self.error = error

    @staticmethod
    def of(error: JobError) -> "JobProblem":
        """The problem with this error, of the class for its `fault`."""
        kinds = {"user": UserError, "capacity": CapacityError, "infrastructure": InfrastructureError}
        return _rebuilt(kinds[error.fault], {"error": error})

    def __str__(self) -> str:
        return self.error.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.__dict__)

    def placed(self, *, param: str | None = None, rank: int | None = None) -> Self:
        """Sets the field of the request and the worker in `error`, unless they are set; returns this problem."""
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
    """A JobError whose message ends with the suggestion."""
    if suggestion is not None and message.endswith("."):
        message = f"{message} {suggestion[:1].upper()}{suggestion[1:]}."
    elif suggestion is not None:
        message = f"{message}: {suggestion}"
    return JobError(code=code, message=message, suggestion=suggestion, **rest)


class UserError(JobProblem):
    """The fault is in the request, the data or the model: trying again unchanged can't help, unless it is `retryable`.

    `suggestion` continues the message after a colon or, if the message ends with a full stop, follows as a sentence. It
    has no full stop of its own.
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
    """The job needs more than a machine has. A smaller job or a larger machine helps; trying again unchanged can't."""

    def __init__(self, code: str, message: str, param: str | None = None, *, suggestion: str) -> None:
        super().__init__(_error(code, message, suggestion, fault="capacity", retryable=False, param=param))


class InfrastructureError(JobProblem):
    """The fault is in the machines: the same job may succeed another time, unless it is not `retryable`."""

    def __init__(self, code: str, message: str, *, suggestion: str, retryable: bool = True) -> None:
        super().__init__(_error(code, message, suggestion, fault="infrastructure", retryable=retryable))


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def errno_of(error: BaseException) -> int | None:
    """The errno of an error of the operating system, else None. Errors of safetensors, some of which are OSErrors, have
    it in the message only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = _OS_ERROR.search(str(error))
    return int(told[1]) if told else None


def storage_full(error: BaseException) -> InfrastructureError | None:
    """The problem if `error` means that the storage is full, else None."""
    if errno_of(error) not in _FULL:
        return None
    return InfrastructureError(
        "storage_full",
        f"the storage is full, or a quota is reached: {error}",
        suggestion="once there is room in TUNEWRIGHT_STORAGE, go on from the job's last checkpoint with "
        "/fine_tuning/jobs/resubmit, or submit it again",
    )


def storage_away(error: BaseException) -> bool:
    """Whether `error` means that a disk, or the network to it, doesn't work at the moment."""
    return errno_of(error) in _AWAY


def storage_problem(error: BaseException) -> InfrastructureError | None:
    """The problem if `error` means that the storage is full or doesn't work, else None."""
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
    """Raises an OSError within as its `storage_problem`, if it has one."""
    try:
        yield
    except OSError as error:
        if (problem := storage_problem(error)) is None:
            raise
        raise problem from error


def memory_short(error: BaseException) -> bool:
    """Whether a GPU or the host ran out of memory. Some of torch's errors show this only by their message: those of the
    CPU's allocator, of pinned memory, and of the buffers of nccl and cuBLAS."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch may not be imported
    return named or any(words in str(error) for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))


_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)(?:[^/@\s]*@)?([^?\s'\"]*)(?:\?[^\s'\"]*)?")


def without_secrets(text: str) -> str:
    """The text with its URLs reduced to scheme, host and path: without passwords, and without queries, which may hold
    signatures."""
    return _URL.sub(r"\1\2", text)


def write_details(text: str, job_dir: Path) -> str | None:
    """Writes the details of a failure to ERROR_FILE in the job's directory; returns the file's URI. None if it can't be
    written: a job must be able to end on a full disk.

    Libraries put URLs into their errors, so the text is written `without_secrets`."""
    path = job_dir / ERROR_FILE
    try:
        job_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(without_secrets(text) + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        logger.warning("%s can't be written: %s", path, error)
        return None
    return path.as_uri()


MOST_PROBLEMS = 100
"""Problems of one kind beyond this number are only counted: composing messages takes time, and nobody reads them."""
LONGEST_NAME = 200
"""Characters of a field's dotted path that an error repeats. A key may be as long as the request allows."""


class Problem(NamedTuple):
    """One thing wrong with a request. `param` is the dotted path of the field; None if it doesn't concern just one."""

    param: str | None
    message: str
    code: str = "invalid_value"


class ConfigProblems(Exception):
    """Everything that is wrong with a request (see MOST_PROBLEMS). Never empty."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(f"{p.param}: {p.message}" if p.param else p.message for p in self.problems)

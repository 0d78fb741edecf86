"""The errors a job can end with, and the errors of a request. All survive pickling, so they may cross Ray."""

from typing import NamedTuple

from events.facts import JobError


class JobProblem(Exception):
    """Root of everything that ends a job. `error` is what the job will show; its `fault` says who can act."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error)
        self.error = error

    def __str__(self) -> str:
        return self.error.message


class UserError(JobProblem):
    """The request, the data or the model is to blame: trying again unchanged can't help."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(JobError(code=code, message=message, param=param, fault="user"))

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str | None]]:
        return type(self), (self.error.code, self.error.message, self.error.param)


class InfrastructureError(JobProblem):
    """The machines are to blame: the same job may well succeed another time."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(JobError(code=code, message=message, fault="infrastructure"))

    def __reduce__(self) -> tuple[type["InfrastructureError"], tuple[str, str]]:
        return type(self), (self.error.code, self.error.message)


MOST_PROBLEMS = 100
"""More problems of one kind are counted, not told: finding words for each takes time, and nobody reads them."""


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

"""Errors of jobs: they can be pickled, they say what to do next, and docs/errors.md has every code."""

import ast
import errno
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from events.facts import DataReport, LineError
from trainers.data.prepare import DataInvalid
from trainers.errors import CapacityError, InfrastructureError, JobProblem, UserError, errno_of, write_details
from trainers.settings import ERROR_FILE

ROOT = Path(__file__).parents[2]
REPORT = DataReport(
    uri="file:///rows.jsonl",
    rows=1,
    invalid_rows=2,
    tokens=1,
    trained_tokens=1,
    truncated_rows=0,
    max_seq_len=8,
    length_histogram={},
    errors=[LineError(line=7, message="no"), LineError(line=9, message="no")],
)
PROBLEMS = [
    UserError("a", "b", "model", suggestion="c", rank=1, line=2, retryable=True),
    CapacityError("a", "b", "model", suggestion="c").placed(rank=3),
    InfrastructureError("a", "b", suggestion="c", retryable=False),
    DataInvalid(REPORT, "2 rows are invalid."),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
def test_a_problem_crosses_processes_whole(problem: JobProblem) -> None:
    back = pickle.loads(pickle.dumps(problem))  # noqa: S301  -- made a moment ago
    assert type(back) is type(problem)
    assert back.error == problem.error
    assert str(back) == problem.error.message
    if isinstance(back, DataInvalid):
        assert back.report == REPORT


def test_the_message_ends_with_what_to_do_next() -> None:
    assert str(UserError("a", "there is no file", suggestion="upload it")) == "there is no file: upload it"
    assert str(UserError("a", "There is no file.", suggestion="upload it")) == "There is no file. Upload it."


def test_invalid_data_names_its_first_bad_line() -> None:
    assert PROBLEMS[-1].error.line == 7


def test_where_a_problem_happened_can_be_added_but_not_changed() -> None:
    problem = UserError("a", "b", "model", rank=1).placed(param="data", rank=0)
    assert (problem.error.param, problem.error.rank) == ("model", 1)


def test_the_details_of_a_failure_hold_no_secrets_of_urls(tmp_path: Path) -> None:
    said = (
        "ConnectionError: HTTPSConnectionPool: https://cdn.example/weights?X-Amz-Signature=abc&Expires=9 refused\n"
        "OSError: can't open 's3://key:geheim@bucket/model?versionId=1', while 2 of 3 were read: why?"
    )
    write_details(said, tmp_path)
    assert (tmp_path / ERROR_FILE).read_text() == (
        "ConnectionError: HTTPSConnectionPool: https://cdn.example/weights refused\n"
        "OSError: can't open 's3://bucket/model', while 2 of 3 were read: why?\n"
    )


def test_the_errno_of_an_error_of_safetensors_is_in_its_message(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="os error") as caught:
        safe_open(tmp_path, framework="pt")  # a directory: there is no other error of the disk that a test can make
    assert caught.value.errno is None
    assert errno_of(caught.value) == errno.ENODEV
    assert errno_of(OSError(errno.EIO, "Input/output error")) == errno.EIO
    assert errno_of(OSError("no number")) is None


def test_only_what_changes_by_itself_is_worth_trying_again() -> None:
    assert UserError("a", "b").error.retryable is False
    assert CapacityError("a", "b", suggestion="c").error.retryable is False
    assert InfrastructureError("a", "b", suggestion="c").error.retryable is True


def raised() -> Iterator[tuple[str, str, bool]]:
    """Of each problem that the code makes: code, fault, whether it is retryable."""
    faults = {"UserError": "user", "CapacityError": "capacity", "InfrastructureError": "infrastructure"}
    for file in [*(ROOT / "trainers").rglob("*.py"), *(ROOT / "serve_app").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            made = node.func.id if isinstance(node.func, ast.Name) else ""
            if ast.unparse(node.func) == "super().__init__" and node.args[0].value == "invalid_data":
                made = "UserError"
            if made in faults:
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                default = "True" if made == "InfrastructureError" else "False"
                yield str(node.args[0].value), faults[made], given.get("retryable", default) == "True"


def test_the_table_of_codes_is_that_of_the_code() -> None:
    """tests/serve_app/test_error_codes.py has the other one, of requests."""
    of_jobs, _, _ = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").partition("## Refused requests")
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in of_jobs.splitlines() if line.startswith("| `")]
    documented = [(code.strip("`"), fault, retryable == "yes") for code, fault, retryable, _ in rows]
    assert documented == sorted(set(raised()))

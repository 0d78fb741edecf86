"""docs/errors.md has every code that a request can be answered with, with its status.

They are found in the source: wherever something that takes a `code` is made with one that is written out there.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

from pydantic_core.core_schema import ErrorType

from events.decide import Refused
from serve_app import errors
from serve_app.openai.objects import OpenAIUpload
from trainers.errors import InfrastructureError, UserError

ROOT = Path(__file__).parents[2]
INVALID = 422
OF_ROWS = {"bad_dialog", "bad_mask", "bad_order"}
"""Codes of bad rows of data. They are in no answer, which names the lines instead."""
Codes = dict[str, set[tuple[int, bool]]]
"""By code, its statuses, each with whether a retry can help."""


class Maker(NamedTuple):
    """A function that takes a code: as which argument, with which default, and which answer it makes."""

    position: int
    default: ast.expr | None
    status: int
    retryable: bool


def parsed(*directories: str) -> Iterator[ast.Module]:
    for directory in directories:
        for file in (ROOT / directory).rglob("*.py"):
            yield ast.parse(file.read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls of functions, classes and methods of `self`, with their names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield name.removeprefix("self."), node


def makers(tree: ast.Module) -> dict[str, Maker]:
    """The functions that take a code and make an answer, or a problem, with it."""
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or "code" not in (names := [one.arg for one in node.args.args]):
            continue
        made = {name: call for name, call in calls(node) if name in ("Answer", "Problem")}
        if made:
            status = literal(made["Answer"].args[0]) if "Answer" in made else INVALID
            defaults = dict(zip(reversed(names), reversed(node.args.defaults), strict=False))
            position = names.index("code") - (names[0] == "self")
            found[node.name] = Maker(position, defaults.get("code"), int(status), "Retry-After" in ast.unparse(node))
    return found


def literal(node: ast.expr | None) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


def written_out() -> Codes:
    """The codes that stand in the source."""
    found: Codes = defaultdict(set)
    known = {"Problem": Maker(2, ast.Constant("invalid_value"), INVALID, False)}
    known |= {"PydanticCustomError": Maker(0, None, INVALID, False)}
    for tree in parsed("serve_app"):
        known |= {name: maker for name, maker in makers(tree).items() if not name.startswith("_")}
    for tree in parsed("events", "trainers", "serve_app"):
        here = known | makers(tree)
        for statement in tree.body:
            retryable = "Retry-After" in ast.unparse(statement)
            for name, call in calls(statement):
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                if code := literal(given.get("custom_error_type")):
                    found[code].add((INVALID, False))
                if name == "Answer" and len(call.args) > 2:
                    maker = Maker(2, None, int(literal(call.args[0]) or 400), retryable)
                elif name in here:
                    maker = here[name]
                else:
                    continue
                argument = call.args[maker.position] if len(call.args) > maker.position else given.get("code")
                if argument is not None and ast.unparse(argument) == "f'upload_{upload.status}'":
                    ended = {*get_args(OpenAIUpload.model_fields["status"].annotation)} - {"pending"}
                    codes = [f"upload_{status}" for status in ended]
                else:
                    codes = [literal(argument or maker.default)]
                for code in filter(None, codes):
                    found[code].add((maker.status, maker.retryable))
    return {code: answers for code, answers in found.items() if code not in OF_ROWS}


def looked_up() -> Codes:
    """The codes that have a status of their own in the table of errors."""
    answers = [errors._refused(Refused(code, "")) for code in errors._REFUSALS]
    answers += [errors._user_error(UserError(code, "")) for code in errors._USER_ERRORS]
    made = [InfrastructureError(code, "", suggestion="") for code in errors._INFRASTRUCTURE_ERRORS]
    answers += [errors._infrastructure_error(error) for error in made]
    return {answer.code: {(answer.status, "Retry-After" in answer.headers)} for answer in answers}


def tables() -> tuple[list[list[str]], list[list[str]]]:
    """The cells of the table of jobs, and of that of requests."""
    parts = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").split("## Refused requests")
    of_jobs, of_requests = (
        [[cell.strip(" `") for cell in line.split("|")[1:5]] for line in part.splitlines() if line.startswith("| `")]
        for part in parts
    )
    return of_jobs, of_requests


def statuses(answers: set[tuple[int, bool]]) -> str:
    """Our 422 is a 400 under /v1, which the table doesn't list separately."""
    found = {status for status, _ in answers}
    return ", ".join(str(status) for status in sorted(found - ({400} if INVALID in found else set())))


def expected(found: Mapping[str, set[tuple[int, bool]]], jobs: set[str]) -> list[tuple[str, str, bool]]:
    """The rows of the table of requests. It leaves out codes that only make a request invalid (422) if the table of
    jobs has them."""
    return sorted(
        (code, statuses(answers), any(retryable for _, retryable in answers))
        for code, answers in found.items()
        if code not in jobs or statuses(answers) != str(INVALID)
    )


def test_the_table_of_requests_is_that_of_the_code() -> None:
    of_jobs, of_requests = tables()
    found = written_out()
    for code, answers in looked_up().items():
        found[code] = found.get(code, set()) | answers
    documented = [(code, status, retry == "yes") for code, status, retry, _ in of_requests]
    assert documented == expected(found, {code for code, *_ in of_jobs})


def test_no_code_of_ours_is_one_of_pydantic_s_but_for_the_field_that_is_missing() -> None:
    """The page leaves the names of pydantic's errors to pydantic."""
    ours = {code for table in tables() for code, *_ in table}
    assert ours & {*get_args(ErrorType)} == {"missing"}

"""Parses the JSON of requests, from HTTP or a file, strictly as in RFC 8259; errors say where the problem is.

It refuses what Python's parser accepts but what would fail or change its meaning later: NaN and Infinity, duplicate
keys, NUL characters and lone surrogates (which file names and UTF-8 text can't contain), integers beyond 64 bits,
and nesting deeper than `MAX_DEPTH`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NoReturn

from trainers.errors import LONGEST_NAME, MOST_PROBLEMS, ConfigProblems, Problem

MAX_DEPTH = 64  # The serialisers of pydantic and the event log recurse; this stays far below their limits.
_SHOWN = 60  # Characters of a key that an error message repeats.
_END = (None, None)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises ConfigProblems: with every problem (MOST_PROBLEMS at most) if the text is JSON,
    else with the first one."""
    document = _parse(body)
    if not isinstance(document, dict):
        raise _refuse(f"the body must be a JSON object, not {_kind(document)}")
    problems = list(islice(_unsafe(document), MOST_PROBLEMS))
    if problems:
        raise ConfigProblems(problems)
    return document


def _parse(body: bytes) -> object:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refuse(f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}") from None
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno} (character {error.pos})"
        raise _refuse(f"the body is not valid JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise _refuse(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:  # int() refuses literals of thousands of digits
        raise _refuse("the body holds an integer beyond 64 bits") from None


def _refuse(message: str) -> ConfigProblems:
    return ConfigProblems([Problem(None, message, "invalid_json")])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _refuse(f"the key {shown(twice)} appears twice in one object")
    return document


def _constant(name: str) -> NoReturn:
    raise _refuse(f"{name} is not JSON")


def _unsafe(document: dict[str, Any]) -> Iterator[Problem]:
    """The problems in a parsed document. Doesn't recurse, so no input can exhaust the stack. Builds a path only for a
    problem: with a long key above a long list, building one for each element would take too long."""
    keys: list[str | int] = []  # path of the container that is being walked
    opened: list[Iterator[tuple[str | int, Any]]] = [iter(document.items())]
    while opened:
        key, value = next(opened[-1], _END)
        if key is None:
            opened.pop()
            del keys[-1:]
        elif isinstance(key, str) and (complaint := _complaint(key)):
            yield Problem(_dotted(keys), f"the key {shown(key)} {complaint}", "invalid_json")
        elif len(opened) == MAX_DEPTH:
            yield Problem(_dotted(keys[:1]), f"nested deeper than {MAX_DEPTH} levels", "invalid_json")
            return
        elif isinstance(value, dict | list):
            keys.append(key)
            opened.append(iter(value.items() if isinstance(value, dict) else enumerate(value)))
        elif complaint := _complaint(value):
            yield Problem(_dotted([*keys, key]), complaint, "invalid_json")


def _dotted(keys: Sequence[str | int]) -> str | None:
    """The path, with long keys cut; None for the document itself."""
    return ".".join(str(key)[: LONGEST_NAME + 1] for key in keys) if keys else None


def _complaint(value: object) -> str | None:
    if isinstance(value, str):
        if "\0" in value:
            return "contains a NUL character"
        try:
            value.encode()
        except UnicodeEncodeError:
            return "contains a lone surrogate, which is not Unicode text"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "is an integer beyond 64 bits"
    elif isinstance(value, float) and not math.isfinite(value):
        return "is a number beyond double precision"
    return None


def shown(text: str) -> str:
    """`text` quoted for an error message: shortened, with everything but printable ASCII escaped."""
    return ascii(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")

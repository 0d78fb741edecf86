"""Parses `overrides`: torchrun's flags, and `key=value` settings as `tune run` takes them.

The parser of the flags mirrors torchrun's own (a test compares the two), because requests are checked without importing
torch. A flag that has no meaning under Ray is refused by name.
"""

import json
import re
import shlex
import threading
from argparse import ArgumentParser, Namespace
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

from trainers.errors import Problem

PARAM = "overrides"
MAX_WORKERS_PER_NODE = 1024
MAX_NODES = 4096
MAX_RESTARTS = 1000

_RENDEZVOUS = "Ray starts the workers and brings them together, so there is no rendezvous to configure"
_PLACEMENT = "Ray places the workers and gives each its rank and address"
_OUTPUT = "everything the workers print goes to the job's log; read it with tail"
_PROCESSES = "Ray starts, watches and ends the worker processes"
_SCRIPT = "the service runs its own training script"

# Flag (torchrun's dashed spelling) -> why it is refused; None: it is supported.
_VALUE_FLAGS: dict[str, str | None] = {
    "--nnodes": None,
    "--nproc-per-node": None,
    "--rdzv-backend": _RENDEZVOUS,
    "--rdzv-endpoint": _RENDEZVOUS,
    "--rdzv-id": _RENDEZVOUS,
    "--rdzv-conf": _RENDEZVOUS,
    "--max-restarts": None,
    "--monitor-interval": _PROCESSES,
    "--start-method": _PROCESSES,
    "--event-log-handler": _OUTPUT,
    "--role": _PLACEMENT,
    "--log-dir": _OUTPUT,
    "--redirects": _OUTPUT,
    "--tee": _OUTPUT,
    "--local-ranks-filter": _OUTPUT,
    "--duplicate-stdout-filters": _OUTPUT,
    "--duplicate-stderr-filters": _OUTPUT,
    "--node-rank": _PLACEMENT,
    "--master-addr": _RENDEZVOUS,
    "--master-port": _RENDEZVOUS,
    "--local-addr": _PLACEMENT,
    "--logs-specs": _OUTPUT,
    "--numa-binding": _PLACEMENT,
    "--signals-to-handle": _PROCESSES,
    "--shutdown-timeout": _PROCESSES,
}
_SWITCHES: dict[str, str] = {
    "--standalone": _RENDEZVOUS,
    "--module": _SCRIPT,
    "--no-python": _SCRIPT,
    "--run-path": _SCRIPT,
    "--virtual-local-rank": _PLACEMENT,
    "--help": "docs/configuration.md lists what overrides may contain",
}
_SHORT = {"--redirects": ["-r"], "--tee": ["-t"], "--module": ["-m"], "--help": ["-h"]}


_OF_THIS_THREAD = threading.local()


class Overrides(NamedTuple):
    """`settings`: the `key=value` parts in order, values parsed but not yet checked against the table of keys."""

    nnodes: int
    nproc_per_node: int
    max_restarts: int
    settings: list[tuple[str, Any]]


class _UnreadableError(Exception):
    """argparse can't read the flags; the message is what it would have printed before it exits."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UnreadableError(message)


def _attribute(flag: str) -> str:
    return flag[2:].replace("-", "_")


def torchrun_mirror() -> ArgumentParser:
    """A parser with torchrun's options. Values stay strings; a switch that is given is True."""
    parser = _Parser(add_help=False, argument_default=None, usage="")  # composing the usage text takes time
    for flag in (*_VALUE_FLAGS, *_SWITCHES):
        spellings = [*_SHORT.get(flag, ()), *dict.fromkeys((flag, f"--{_attribute(flag)}"))]
        parser.add_argument(*spellings, action="store" if flag in _VALUE_FLAGS else "store_true", default=None)
    parser.add_argument("settings", nargs="*")
    return parser


def _parser() -> ArgumentParser:
    """This thread's parser, made once: making one takes as long as the rest of a submit's checks, and argparse modifies
    a parser while it parses intermixed arguments."""
    if not hasattr(_OF_THIS_THREAD, "parser"):
        _OF_THIS_THREAD.parser = torchrun_mirror()
    parser: ArgumentParser = _OF_THIS_THREAD.parser
    return parser


def parse_overrides(text: str | None) -> tuple[Overrides, list[Problem]]:
    """The content of `text`, and everything that is wrong with it. A flag with a problem has its default value."""
    try:
        words = shlex.split(text or "")
        given, unknown = _parser().parse_known_intermixed_args(words)
    except (ValueError, _UnreadableError) as error:
        return Overrides(1, 1, 3, []), [_problem(str(error))]
    problems = [_unknown_flag(word) for word in unknown]
    problems += _refused(given)
    settings: list[tuple[str, Any]] = []
    for word in given.settings:
        key, equals, value = word.partition("=")
        if key.startswith("~"):
            problems.append(_problem(f"{word}: removing a key isn't offered; set it instead, e.g. lr_scheduler=null"))
        elif not equals or not key:
            problems.append(_problem(f"{word}: expected a torchrun flag or key=value"))
        else:
            settings.append((key, parse_value(value)))
    nnodes = _count(given.nnodes, "--nnodes", 1, 1, MAX_NODES, problems)
    nproc = _count(given.nproc_per_node, "--nproc_per_node", 1, 1, MAX_WORKERS_PER_NODE, problems)
    restarts = _count(given.max_restarts, "--max-restarts", 3, 0, MAX_RESTARTS, problems)
    return Overrides(nnodes, nproc, restarts, settings), problems


def _problem(message: str, code: str = "invalid_overrides") -> Problem:
    return Problem(PARAM, message, code)


def _unknown_flag(word: str) -> Problem:
    name = word.partition("=")[0]
    known = [*_VALUE_FLAGS, *_SWITCHES]
    near = get_close_matches(name.replace("_", "-"), known, 1)
    hint = f"did you mean {near[0]}?" if near else "docs/configuration.md lists what overrides may contain"
    return _problem(f"{name}: torchrun has no such flag; {hint}")


def refused_flags() -> dict[str, str]:
    """torchrun's flags that are refused, each with the reason."""
    return {flag: reason for flag, reason in {**_VALUE_FLAGS, **_SWITCHES}.items() if reason}


def _refused(given: Namespace) -> list[Problem]:
    return [
        _problem(f"{flag}: {reason}", "unsupported_override")
        for flag, reason in refused_flags().items()
        if getattr(given, _attribute(flag)) is not None
    ]


def _count(value: str | None, flag: str, default: int, low: int, high: int, problems: list[Problem]) -> int:
    """The whole number that a flag was given. Otherwise adds to `problems` and returns the default."""
    if value is None:
        return default
    if flag == "--nnodes" and ":" in value:
        reason = "a range of nodes (min:max) isn't offered: a job trains on exactly the workers it asks for"
        problems.append(_problem(f"--nnodes {value}: {reason}", "unsupported_override"))
        return default
    if flag == "--nproc_per_node" and value in ("auto", "cpu", "gpu", "xpu"):
        reason = "the machine that trains isn't known when the job is submitted: give the number of workers"
        problems.append(_problem(f"--nproc_per_node {value}: {reason}", "unsupported_override"))
        return default
    if not re.fullmatch(r"[+-]?\d{1,18}", value, re.ASCII) or not low <= int(value) <= high:
        problems.append(_problem(f"{flag} {value[:40]}: must be a whole number from {low} to {high}"))
        return default
    return int(value)


_WORDS = {"null": None, "none": None, "~": None, "": None, "true": True, "false": False}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MAX_DIGITS = 300


def parse_value(text: str) -> object:
    """The value after `key=`: null, true, false, a number, JSON, a list like `[q_proj, v_proj]`, else the text."""
    lowered = text.strip().lower()
    if lowered in _WORDS:
        return _WORDS[lowered]
    if _NUMBER.fullmatch(lowered) and len(lowered) <= _MAX_DIGITS:
        return int(lowered) if re.fullmatch(r"[+-]?\d+", lowered) else float(lowered)
    if text.startswith(("[", "{", '"')):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if text.startswith("[") and text.endswith("]"):
                return [parse_value(part.strip()) for part in text[1:-1].split(",")]
    return text

"""Checks of single values from JSON or a command line.

A check returns the value with its type, or raises ValueError with a message that follows the field's name, such as
"must be a whole number from 1 to 64, not true". Nothing is coerced: the string "2e-5" is not a number.
"""

import math
from collections.abc import Callable
from reprlib import Repr
from typing import Any

Check = Callable[[object], Any]

_repr = Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 80, 80


def shown(value: object) -> str:
    """`value` for an error message, with JSON's words for null, true and false; shortened if it is long or deeply
    nested."""
    words = {True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return "null" if value is None else words[value]
    return _repr.repr(value)


def refuse(wanted: str, value: object) -> ValueError:
    hint = " (a number goes without quotes)" if "number" in wanted and _is_quoted_number(value) else ""
    return ValueError(f"must be {wanted}, not {shown(value)}{hint}")


def _is_quoted_number(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def integer(low: int, high: int) -> Check:
    wanted = f"a whole number from {low} to {high}"

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise refuse(wanted, value)
        return value

    return check


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Check:
    """A finite number in [low, high]; `above` and `below` exclude the bound itself."""
    start = f"greater than {low:g}" if above else f"of at least {low:g}"
    end = "" if high == math.inf else f" and {'less than' if below else 'at most'} {high:g}"
    wanted = f"a number {start}{end}"

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse(wanted, value)
        try:
            real = float(value)
        except OverflowError:
            raise refuse(wanted, value) from None
        too_low = real <= low if above else real < low
        too_high = real >= high if below else real > high
        if not math.isfinite(real) or too_low or too_high:
            raise refuse(wanted, value)
        return real

    return check


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise refuse("true or false", value)
    return value


def choice(*allowed: str) -> Check:
    wanted = " or ".join(f"'{word}'" for word in allowed)

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise refuse(wanted, value)
        return value

    return check


def subset(*allowed: str) -> Check:
    """A list of distinct words from `allowed`; it may be empty."""
    wanted = f"a list of different names out of {', '.join(allowed)}"

    def check(value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
            raise refuse(wanted, value)
        unknown = [word for word in value if word not in allowed]
        if unknown:
            raise ValueError(f"must be {wanted}; there is no {shown(unknown[0])}")
        if len(set(value)) != len(value):
            raise refuse(wanted, value)
        return tuple(value)

    return check


def pair(each: Check) -> Check:
    def check(value: object) -> list[Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise refuse("a list of two numbers", value)
        return [each(one) for one in value]

    return check


def nullable(inner: Check) -> Check:
    """`inner`, or null."""

    def check(value: object) -> object:
        return None if value is None else inner(value)

    return check

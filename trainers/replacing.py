"""Replaces functions of Ray for which Ray has no option."""

from typing import Any


def replace(owner: Any, name: str, replacement: object) -> Any:  # noqa: ANN401  -- any class or module
    """Sets `owner.name`, and returns its former value. Raises AttributeError if this version of Ray lacks it."""
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    return before

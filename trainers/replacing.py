"""How parts of Ray that have no option are replaced."""

from typing import Any


def replace(owner: Any, name: str, replacement: object) -> Any:  # noqa: ANN401  -- any class or module
    """Sets `owner.name`, and returns what it was. Raises AttributeError where Ray has it no more."""
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    return before

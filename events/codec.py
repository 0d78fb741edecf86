"""Events as versioned JSON text, and back.

What was written is never changed, so a reader meets every version there ever was, and newer ones after a rollback:

- an older version of an event (`v` below today's) goes through `UPCASTERS`, one version at a time;
- an added field it lacks takes its default; a field it has and we don't know is left out;
- what can't be understood (an unknown type, a newer version) becomes an `UnknownEvent`, kept to the letter.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from events.facts import Event, Fact


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """An event of a newer version of Tunewright (or not ours). The fold keeps it and ignores it."""

    type: str
    body: str

    @property
    def kind(self) -> str:
        """Type and version, for people."""
        return f"{self.type} version {_header(self.body)[2]}"


AnyEvent = Event | UnknownEvent
Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

UPCASTERS: dict[tuple[str, int], Upcaster] = {}
"""(type, version) -> what turns the JSON of that version into the next version's. `v` itself is raised by `decode`."""

_EVENT: TypeAdapter[Fact] = TypeAdapter(Event)
_KINDS: tuple[type[Fact], ...] = get_args(get_args(Event)[0])
_VERSIONS: dict[str, int] = {kind.__name__: kind.model_fields["v"].default for kind in _KINDS}


class CorruptEventError(Exception):
    """The store gave back something that never was an event: not a JSON object with `type` and `v`."""


def encode(event: AnyEvent) -> str:
    """One line of JSON. Raises ValueError for an event that holds what JSON can't."""
    return event.body if isinstance(event, UnknownEvent) else event.model_dump_json()


def decode(body: str) -> AnyEvent:
    """The inverse of `encode`, for every version. Raises CorruptEventError."""
    try:
        event = _EVENT.validate_json(body, extra="ignore")
    except ValidationError:
        return _decode_other_version(body)
    if event.v != _VERSIONS[type(event).__name__]:
        return _decode_other_version(body)
    return event  # type: ignore[return-value]  # the adapter is of Event


def _decode_other_version(body: str) -> AnyEvent:
    fields, kind, version = _header(body)
    while (upcast := UPCASTERS.get((kind, version))) is not None:
        version += 1
        fields = {**upcast(fields), "v": version}
    if version != _VERSIONS.get(kind):
        return UnknownEvent(kind, body)
    try:
        return _EVENT.validate_python(fields, extra="ignore")  # type: ignore[return-value]  # the adapter is of Event
    except ValidationError:
        return UnknownEvent(kind, body)


def _header(body: str) -> tuple[dict[str, Any], str, int]:
    """The event's fields, its type and version."""
    try:
        fields = json.loads(body)
    except ValueError:
        fields = None
    match fields:
        case {"type": str(kind), "v": int(version)}:
            return fields, kind, version
        case _:
            raise CorruptEventError(f"not an event: {body[:200]!r}")

"""Events as versioned JSON text, and back.

Written events are never changed, so a reader meets events of every earlier version and, after a rollback, newer ones:

- an older version of an event (`v` below the current one) goes through `UPCASTERS`, one version at a time;
- a missing field takes its default; an unknown field is left out;
- an event that can't be read (an unknown type, a newer version, a value that isn't valid) becomes an `UnknownEvent`,
  whose text is kept unchanged.
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
"""(type, version) -> a function that turns the fields of that version into the next version's. `decode` sets `v`."""

_EVENT: TypeAdapter[Fact] = TypeAdapter(Event)
_KINDS: tuple[type[Fact], ...] = get_args(get_args(Event)[0])
_VERSIONS: dict[str, int] = {kind.__name__: kind.model_fields["v"].default for kind in _KINDS}


class CorruptEventError(Exception):
    """A text from the store is not an event: no JSON object with `type` and `v`."""


def encode(event: AnyEvent) -> str:
    """The event as one line of JSON. Raises ValueError for an event that can't be written as JSON."""
    return event.body if isinstance(event, UnknownEvent) else event.model_dump_json()


def decode(body: str) -> AnyEvent:
    """The inverse of `encode`, for events of every version. Raises CorruptEventError."""
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

"""The contract of an event store. Every store passes all of it."""

import pickle
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from events import sqlite
from events.codec import UnknownEvent, encode
from events.memory import MemoryStore
from events.sqlite import SqliteStore
from events.store import EventStore, ExpectedVersionError, Recorded
from tests.events.facts_of_a_job import ADMITTED, START, SUBMITTED, VALIDATED
from tests.events.support import add


@pytest.fixture(params=["memory", "sqlite", "sqlite, its streams brought up to date after each second event"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventStore]:
    if "second" in request.param:
        monkeypatch.setattr(sqlite, "_STRIDE", 2)
    store: EventStore = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "events.db")
    yield store
    store.close()


def places(recorded: list[Recorded]) -> list[tuple[int, str, int, str]]:
    return [(one.position, one.job_id, one.version, one.event_id) for one in recorded]


def test_a_new_store_is_empty(store: EventStore) -> None:
    assert store.last_position() == 0
    assert store.read_all() == []
    assert store.read_stream("a") == []
    assert store.find(["e1"]) == {}


def test_what_was_appended_reads_back_the_same(store: EventStore) -> None:
    time = START + timedelta(microseconds=1)
    unknown = UnknownEvent("JobPaused", '{"v":1,"type":"JobPaused"}')
    written = add(store, [("a", "e1", SUBMITTED), ("a", "e2", unknown), ("b", "e3", SUBMITTED)], time)
    assert store.read_all() == written
    assert store.read_stream("a") == written[:2]
    assert store.read_stream("b") == written[2:]
    assert written[0].event == SUBMITTED
    assert written[0].time == time


def test_positions_go_on_over_all_streams_and_versions_in_each(store: EventStore) -> None:
    add(store, [("a", "e1", SUBMITTED)])
    add(store, [("b", "e2", SUBMITTED), ("a", "e3", VALIDATED)])
    add(store, [("a", "e4", ADMITTED)])
    assert places(store.read_all()) == [(1, "a", 0, "e1"), (2, "b", 0, "e2"), (3, "a", 1, "e3"), (4, "a", 2, "e4")]
    assert places(store.read_stream("a")) == [(1, "a", 0, "e1"), (3, "a", 1, "e3"), (4, "a", 2, "e4")]
    assert store.last_position() == 4


def test_reading_all_goes_on_after_a_position(store: EventStore) -> None:
    add(store, [("a", f"e{number}", ADMITTED) for number in range(5)])
    assert [one.position for one in store.read_all(after_position=1, limit=2)] == [2, 3]
    assert store.read_all(after_position=5) == []


@pytest.mark.parametrize("after", range(-1, 6))
@pytest.mark.parametrize("limit", range(1, 5))
def test_reading_a_stream_goes_on_after_a_version(store: EventStore, after: int, limit: int) -> None:
    add(store, [("b", "x", SUBMITTED), *(("a", f"e{number}", ADMITTED) for number in range(5))])
    read = [one.version for one in store.read_stream("a", after_version=after, limit=limit)]
    assert read == [version for version in range(5) if version > after][:limit]


@pytest.mark.parametrize(("position", "version"), [(2, 1), (4, 1), (3, 0), (3, 2)])
def test_what_does_not_go_on_where_the_store_ends_is_not_written(
    store: EventStore, position: int, version: int
) -> None:
    before = add(store, [("a", "e1", SUBMITTED), ("b", "e2", SUBMITTED)])
    new = Recorded(position, "a", version, "e3", START, VALIDATED)
    with pytest.raises(ValueError, match="does not follow event 0 of the job and position 2 of the log"):
        store.append([(new, encode(VALIDATED))])
    assert store.read_all() == before
    add(store, [("a", "e3", VALIDATED)])


def test_an_append_of_nothing_changes_nothing(store: EventStore) -> None:
    store.append([])
    assert store.last_position() == 0


def test_events_are_found_by_their_ids(store: EventStore) -> None:
    add(store, [("a", "e1", SUBMITTED), ("a", "e2", VALIDATED)])
    assert places(list(store.find(["e2", "e9"]).values())) == [(2, "a", 1, "e2")]


def test_the_error_of_a_stale_writer_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ExpectedVersionError("a", 3, 5)))  # noqa: S301  -- our own bytes
    assert (error.job_id, error.expected, error.actual) == ("a", 3, 5)

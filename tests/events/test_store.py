"""The contract of an event store. Every store passes all of it."""

import pickle
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from events import ExpectedVersionError, MemoryStore, SqliteStore
from events.codec import AnyEvent, UnknownEvent
from events.store import EventStore, NewEvent, Recorded, StreamAppend
from tests.events.facts_of_a_job import ADMITTED, CANCEL, START, SUBMITTED, VALIDATED


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventStore]:
    store: EventStore = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "events.db")
    yield store
    store.close()


def to(job_id: str, *events: tuple[str, AnyEvent], expected: int | None = None) -> StreamAppend:
    return StreamAppend(job_id, [NewEvent.of(event_id, event) for event_id, event in events], expected)


def places(recorded: list[Recorded]) -> list[tuple[int, str, int, str]]:
    return [(one.position, one.job_id, one.version, one.event_id) for one in recorded]


def test_a_new_store_is_empty(store: EventStore) -> None:
    assert store.read_all() == []
    assert store.read_stream("a") == []
    assert store.find(["e1"]) == {}


def test_an_append_says_where_each_event_stands(store: EventStore) -> None:
    [first, second] = store.append([to("a", ("e1", SUBMITTED), ("e2", VALIDATED)), to("b", ("e3", SUBMITTED))], START)
    assert places(first) == [(1, "a", 0, "e1"), (2, "a", 1, "e2")]
    assert places(second) == [(3, "b", 0, "e3")]


def test_what_was_appended_reads_back_the_same(store: EventStore) -> None:
    time = START + timedelta(microseconds=1)
    [written] = store.append(
        [to("a", ("e1", SUBMITTED), ("e2", UnknownEvent("JobPaused", '{"v":1,"type":"JobPaused"}')))], time
    )
    assert store.read_stream("a") == store.read_all() == written
    assert written[0].event == SUBMITTED
    assert written[0].time == time


def test_positions_go_on_over_all_streams(store: EventStore) -> None:
    store.append([to("a", ("e1", SUBMITTED))], START)
    store.append([to("b", ("e2", SUBMITTED))], START)
    store.append([to("a", ("e3", VALIDATED))], START)
    assert places(store.read_all()) == [(1, "a", 0, "e1"), (2, "b", 0, "e2"), (3, "a", 1, "e3")]


def test_reading_all_goes_on_after_a_position(store: EventStore) -> None:
    store.append([to("a", *((f"e{number}", ADMITTED) for number in range(5)))], START)
    assert [one.position for one in store.read_all(after_position=1, limit=2)] == [2, 3]
    assert store.read_all(after_position=5) == []


def test_reading_a_stream_goes_on_after_a_version(store: EventStore) -> None:
    store.append([to("b", ("x", SUBMITTED)), to("a", *((f"e{number}", ADMITTED) for number in range(5)))], START)
    assert [one.version for one in store.read_stream("a", after_version=1, limit=2)] == [2, 3]
    assert store.read_stream("a", after_version=4) == []


@pytest.mark.parametrize("expected", [None, -1])
def test_a_stream_begins_when_none_is_expected(store: EventStore, expected: int | None) -> None:
    store.append([to("a", ("e1", SUBMITTED), expected=expected)], START)
    assert len(store.read_stream("a")) == 1


def test_a_writer_that_knows_the_last_version_is_let_in(store: EventStore) -> None:
    store.append([to("a", ("e1", SUBMITTED), ("e2", VALIDATED))], START)
    store.append([to("a", ("e3", ADMITTED), expected=1)], START)
    assert [one.version for one in store.read_stream("a")] == [0, 1, 2]


@pytest.mark.parametrize("expected", [-1, 0, 2])
def test_a_stale_writer_is_refused_and_writes_nothing(store: EventStore, expected: int) -> None:
    store.append([to("a", ("e1", SUBMITTED), ("e2", VALIDATED))], START)
    with pytest.raises(ExpectedVersionError) as stale:
        store.append([to("b", ("e3", SUBMITTED)), to("a", ("e4", ADMITTED), expected=expected)], START)
    assert (stale.value.job_id, stale.value.expected, stale.value.actual) == ("a", expected, 1)
    assert str(stale.value) == f"job a: expected version {expected}, is 1"
    assert [one.event_id for one in store.read_all()] == ["e1", "e2"]
    assert store.read_stream("b") == []


def test_expected_versions_see_what_the_batch_has_appended_before(store: EventStore) -> None:
    store.append([to("a", ("e1", SUBMITTED), expected=-1), to("a", ("e2", VALIDATED), expected=0)], START)
    assert [one.event_id for one in store.read_stream("a")] == ["e1", "e2"]


def test_an_event_sent_again_is_one_event_where_it_first_was(store: EventStore) -> None:
    [first] = store.append([to("a", ("e1", SUBMITTED), expected=-1)], START)
    [again] = store.append([to("a", ("e1", SUBMITTED), expected=-1)], START + timedelta(seconds=9))
    assert again == first
    assert store.read_all() == first


def test_an_event_twice_in_a_batch_is_one_event(store: EventStore) -> None:
    [first, again] = store.append([to("a", ("e1", SUBMITTED)), to("a", ("e1", SUBMITTED))], START)
    assert again == first
    assert len(store.read_all()) == 1


def test_a_batch_that_is_known_in_part_adds_the_rest(store: EventStore) -> None:
    store.append([to("a", ("e1", SUBMITTED))], START)
    [both] = store.append([to("a", ("e1", SUBMITTED), ("e2", VALIDATED))], START)
    assert places(both) == [(1, "a", 0, "e1"), (2, "a", 1, "e2")]
    assert places(store.read_all()) == places(both)


def test_a_refused_event_may_be_sent_again(store: EventStore) -> None:
    store.append([to("a", ("e1", SUBMITTED))], START)
    with pytest.raises(ExpectedVersionError):
        store.append([to("a", ("e2", CANCEL), expected=7)], START)
    store.append([to("a", ("e2", CANCEL), expected=0)], START)
    assert places(store.read_stream("a", 0)) == [(2, "a", 1, "e2")]


def test_events_are_found_by_their_ids(store: EventStore) -> None:
    store.append([to("a", ("e1", SUBMITTED), ("e2", VALIDATED))], START)
    assert places(list(store.find(["e2", "e9"]).values())) == [(2, "a", 1, "e2")]


def test_the_error_of_a_stale_writer_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ExpectedVersionError("a", 3, 5)))  # noqa: S301  -- our own bytes
    assert (error.job_id, error.expected, error.actual) == ("a", 3, 5)

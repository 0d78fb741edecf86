"""A log whose file was damaged: nothing is served that is not as it was written, and what is whole is served."""

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from events import sqlite
from events.decide import Refused
from events.log import EventLog
from events.memory import MemoryStore
from events.snapshot import take
from events.sqlite import SqliteStore
from events.sqlite_schema import SCHEMA
from events.store import JobDamagedError, StoreFailedError
from tests.events.facts_of_a_job import CANCEL, SUBMITTED
from tests.events.support import add, append, change, check_all, opened, write
from tests.waiting import WAIT_S, async_eventually


@pytest.fixture(autouse=True, params=[sqlite._STRIDE, 4], ids=["in memory", "in streams"])
def stride(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The positions of each job's events are all in memory, or those of the first twelve of fifteen in `streams`. A
    check takes four events at a time."""
    stride: int = request.param
    monkeypatch.setattr(sqlite, "_STRIDE", stride)
    monkeypatch.setattr(sqlite, "_CHECKED_AT_ONCE", 4)
    return stride


def checked(file: Path) -> dict[int, tuple[str, ...]]:
    """What a check of the whole store finds: position and jobs."""
    with closing(SqliteStore(file)) as store:
        check_all(store)
        return {position: damage.job_ids for position, damage in store.damage.items()}


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE events SET event = replace(event, '10', '11') WHERE position = 5",
        "UPDATE events SET time = '2026-11-22T12:00:01+00:00' WHERE position = 5",
        "UPDATE events SET event_id = 'b9' WHERE position = 5",
        "UPDATE events SET checksum = checksum + 1 WHERE position = 5",
    ],
)
def test_a_job_with_an_event_that_is_not_as_it_was_written_is_refused_and_the_others_are_served(
    tmp_path: Path, sql: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "events.db"
    write(file)
    change(file, sql)

    async def scenario() -> None:
        async with opened(file) as log:
            for call in (
                log.job("b"),
                log.job_json("b"),
                log.read("b"),
                log.wait("b", -1, 0),
                append(log, "b", CANCEL),
            ):
                with pytest.raises(Refused, match="the history of job b is damaged") as refused:
                    await call
                assert refused.value.code == "job_damaged"
            assert [job.job_id for job in (await log.jobs(2))[0]] == ["c", "a"]
            assert [job.job_id for job in (await log.live_jobs()).jobs] == ["a", "c"]
            await append(log, "a", CANCEL)
            assert (await log.job("a")).cancel_requested
            assert await log.subscribe(15) != []

    asyncio.run(scenario())
    assert "position 5, of job b, is damaged" in caplog.text


def test_whoever_follows_the_log_to_a_damaged_end_waits_for_what_comes_after_it(tmp_path: Path) -> None:
    write(tmp_path / "events.db")
    change(tmp_path / "events.db", "UPDATE events SET checksum = checksum + 1 WHERE position >= 14")

    async def scenario() -> None:
        async with opened(tmp_path / "events.db") as log:
            began = time.monotonic()
            assert await log.subscribe(13, wait_s=0.1) == []
            assert time.monotonic() - began >= 0.1
            page, _ = await asyncio.gather(log.subscribe(13, wait_s=WAIT_S), append(log, "a", CANCEL))
            assert [recorded.position for recorded in page] == [16]

    asyncio.run(scenario())


@pytest.mark.parametrize("position", [5, 15], ids=["in the middle", "the last one"])
def test_events_that_are_gone_with_every_trace_of_whose_they_were_stop_the_log(tmp_path: Path, position: int) -> None:
    file = tmp_path / "events.db"
    write(file)
    for table in ("events", "streams"):
        change(file, f"DELETE FROM {table} WHERE position = {position}")  # noqa: S608  -- a name and a number
    assert checked(file)[position] == ()
    with closing(SqliteStore(file)) as store, pytest.raises(StoreFailedError, match=f"at position {position} "):
        EventLog(store)


def test_a_lost_page_takes_the_jobs_with_events_on_it_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    write(file)
    with closing(SqliteStore(file)) as store:
        add(store, [("z", f"z{number}", CANCEL) for number in range(100)])  # they fill pages of their own
    at = file.read_bytes().rindex(b"z90")
    page = at - at % 4096
    with file.open("r+b") as raw:
        raw.seek(page)
        raw.write(bytes(4096))
    assert {owner for owners in checked(file).values() for owner in owners} == {"z"}


def test_an_event_that_an_index_does_not_lead_to_is_found(tmp_path: Path) -> None:
    """Otherwise a retry of it would be written a second time."""
    file = tmp_path / "events.db"
    write(file)
    content = file.read_bytes()
    entry = content.rindex(b"b2")  # in the index of the event ids, which stands behind the events
    file.write_bytes(content[:entry] + b"b?" + content[entry + 2 :])
    found = checked(file)
    assert 8 in found  # those after it are no longer in order
    assert set(found.values()) == {("b",)}


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("DELETE FROM streams WHERE job_id = 'b' AND version = 3", {11: ("b",), 14: ("b",)}),
        ("DELETE FROM streams WHERE job_id = 'b' AND version = 2", {8: ("b",), 11: ("b",)}),
        ("UPDATE streams SET position = 12 WHERE job_id = 'b' AND version = 3", {11: ("b",)}),
        ("UPDATE streams SET job_id = 'd' WHERE job_id = 'b'", dict.fromkeys((2, 5, 8, 11, 14), ("b",))),
    ],
)
def test_a_job_that_does_not_lead_to_all_of_its_events_is_found(
    tmp_path: Path, stride: int, sql: str, found: dict[int, tuple[str, ...]]
) -> None:
    file = tmp_path / "events.db"
    write(file)
    change(file, sql)
    in_streams = stride == 4
    assert checked(file) == (found if in_streams else {})
    with closing(SqliteStore(file)) as store:
        assert len(store.read_stream("a")) == 5
        if in_streams:
            with pytest.raises(JobDamagedError, match="of job b is damaged or missing"):
                store.read_stream("b")


def test_damage_that_a_snapshot_hides_at_the_start_is_found_soon_after(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    write(file)

    async def scenario() -> None:
        async with opened(file) as log:
            log._store.keep_snapshot(take(log._jobs.all(), (await log.subscribe(14))[0]))
        change(file, "UPDATE events SET checksum = 0 WHERE position = 5")
        async with opened(file) as log:

            async def stops_running() -> bool:
                return (await log.job("b")).status != "running"

            with pytest.raises(Refused, match="position 5: its checksum is wrong"):
                await async_eventually(stops_running, 30, lambda: "the damage is not found")
            assert (await log.job("a")).status == "running"

    asyncio.run(scenario())


class Growing(MemoryStore):
    """A store whose check never ends, as if others wrote faster than it checks."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: list[int] = []

    def check(self, after_position: int) -> int:
        self.checked.append(after_position)
        return after_position + 1


def test_a_check_ends_with_what_was_there_at_the_start() -> None:
    async def scenario() -> None:
        store = Growing()
        add(store, [("a", "a0", SUBMITTED), ("a", "a1", CANCEL)])
        async with opened(store) as log:
            await async_eventually(lambda: not log._checking.is_alive(), WAIT_S, lambda: f"checks {store.checked}")
            assert store.checked == [0, 1]

    asyncio.run(scenario())


def test_a_stream_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    write(tmp_path / "events.db")
    change(tmp_path / "events.db", "UPDATE events SET version = 9 WHERE position = 5")
    with closing(SqliteStore(tmp_path / "events.db")) as store:
        with pytest.raises(JobDamagedError, match="of job b is damaged or missing"):
            store.read_stream("b")
        assert len(store.read_stream("a")) == 5


def test_a_damaged_record_of_the_last_position_is_reported_and_the_log_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    write(file)
    change(file, "UPDATE head SET position = 14")
    assert list(checked(file)) == [0]
    with closing(SqliteStore(file)) as store:
        add(store, [("a", "a9", CANCEL)])
        assert store.last_position() == 16
    assert checked(file) == {}


def test_a_log_that_ends_before_what_was_acknowledged_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    write(file, "a")
    older = file.read_bytes()
    write(file, "b")
    file.write_bytes(older)
    with pytest.raises(StoreFailedError, match="up to position 10 were acknowledged, it ends at 5"):
        SqliteStore(file)
    (tmp_path / "events.db.lock").unlink()
    with closing(SqliteStore(file)) as store:
        assert store.last_position() == 5


def test_a_file_that_is_no_event_log_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "noise.db").write_bytes(b"noise" * 2000)
    with pytest.raises(StoreFailedError, match="can't be opened: file is not a database"):
        SqliteStore(tmp_path / "noise.db")
    change(tmp_path / "other.db", "CREATE TABLE events (position INTEGER PRIMARY KEY)")
    with pytest.raises(StoreFailedError, match="no event log"):
        SqliteStore(tmp_path / "other.db")


def test_a_log_whose_tables_are_no_longer_described_in_utf_8_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    write(file)
    content = file.read_bytes()
    assert b"    position INTEGER NOT NULL" in content
    file.write_bytes(content.replace(b"    position INTEGER NOT NULL", b"   \xa0position INTEGER NOT NULL"))
    with pytest.raises(StoreFailedError, match="decode to UTF-8"):
        SqliteStore(file)


_SCHEMA_1 = """
CREATE TABLE events (
    position INTEGER PRIMARY KEY, job_id TEXT NOT NULL, version INTEGER NOT NULL, event_id TEXT NOT NULL UNIQUE,
    time TEXT NOT NULL, event TEXT NOT NULL, UNIQUE (job_id, version)
) STRICT
"""
_SCHEMA_2 = _SCHEMA_1.replace("TEXT NOT NULL, UNIQUE", "TEXT NOT NULL, checksum INTEGER NOT NULL, UNIQUE")


@pytest.mark.parametrize("version", [1, 2])
def test_a_log_of_an_earlier_schema_is_rewritten(tmp_path: Path, version: int) -> None:
    file = tmp_path / "old.db"
    write(tmp_path / "new.db")
    with closing(sqlite3.connect(file)) as db, db:
        db.execute(_SCHEMA_1 if version == 1 else _SCHEMA_2)
        db.execute("ATTACH ? AS new", [str(tmp_path / "new.db")])
        columns = "position, job_id, version, event_id, time, event" + ", checksum" * (version == 2)
        db.execute(f"INSERT INTO main.events SELECT {columns} FROM new.events")  # noqa: S608  -- a constant
        if version == 2:
            db.execute(SCHEMA["head"])
            db.execute("INSERT INTO main.head SELECT * FROM new.head")
        db.execute(f"PRAGMA main.user_version={version}")
    with closing(SqliteStore(file)) as old, closing(SqliteStore(tmp_path / "new.db")) as new:
        assert old.read_all() == new.read_all()
        assert [old.read_stream(job) for job in "abc"] == [new.read_stream(job) for job in "abc"]
        assert old.last_position() == 15
        assert old.integrity() == []
        add(old, [("a", "a9", CANCEL)])
    assert checked(file) == {}
    change(file, "UPDATE events SET event_id = 'x' WHERE position = 2")
    assert checked(file) == {2: ("b",)}

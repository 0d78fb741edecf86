"""What the SQLite store promises beyond the contract: nothing acknowledged is ever lost."""

import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from events.sqlite import SqliteStore
from events.store import StoreFailedError, StoreLockedError
from tests.events.facts_of_a_job import SUBMITTED
from tests.events.support import add, full_disk


def append(store: SqliteStore, event_id: str) -> None:
    add(store, [(f"job-{event_id}", event_id, SUBMITTED)])


def event_ids(store: SqliteStore) -> list[str]:
    return [recorded.event_id for recorded in store.read_all()]


def test_a_reopened_store_has_everything(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "events.db")) as store:
        append(store, "e1")
        written = store.read_all()
    with closing(SqliteStore(tmp_path / "events.db")) as store:
        assert store.read_all() == written


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        closing(SqliteStore(tmp_path / "events.db")),
        pytest.raises(StoreLockedError, match="another process writes here"),
    ):
        SqliteStore(tmp_path / "events.db")


def test_a_reader_of_the_file_is_refused_by_sqlite_and_named_at_the_next_start(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    count = "SELECT count(*) FROM events"
    with closing(SqliteStore(file)) as store:
        append(store, "e1")
        with closing(sqlite3.connect(file, timeout=0)) as reader:
            with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                reader.execute(count)
            append(store, "e2")
    with closing(sqlite3.connect(file, timeout=0)) as reader:
        assert reader.execute(count).fetchone() == (2,)
        with pytest.raises(StoreLockedError, match="sqlite3 shell"):
            SqliteStore(file)
    with closing(SqliteStore(file)) as store:
        assert event_ids(store) == ["e1", "e2"]


def test_two_backups_into_the_same_file_at_a_time_are_one_backup_and_a_refusal(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "events.db")) as store:
        written = add(store, [(f"job-{number}", f"e{number}", SUBMITTED) for number in range(20_000)])
        with ThreadPoolExecutor(4) as pool:
            errors = [pool.submit(store.backup, tmp_path / "copy.db") for _ in range(4)]
            found = [type(error.exception()) for error in errors]
        assert sorted(found, key=str) == [FileExistsError, FileExistsError, FileExistsError, type(None)]
    with closing(SqliteStore(tmp_path / "copy.db")) as copy:
        assert copy.last_position() == len(written)
        assert copy.integrity() == []


def test_no_memory_is_shared_so_that_network_file_systems_will_do(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "events.db")) as store:
        append(store, "e1")
        store.reopen()
        append(store, "e2")
        assert {path.name for path in tmp_path.iterdir()} == {"events.db", "events.db-wal", "events.db.lock"}


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "events.db")) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(StoreFailedError, match="newer version"):
        SqliteStore(tmp_path / "events.db")
    with pytest.raises(StoreFailedError):  # and not StoreLockedError: the first one let go of the lock
        SqliteStore(tmp_path / "events.db")


def test_after_a_failed_write_the_store_stops_until_it_was_reopened(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "events.db")) as store:
        append(store, "e1")
        with full_disk(tmp_path / "events.db-wal"), pytest.raises(StoreFailedError):
            append(store, "e2")
        with pytest.raises(StoreFailedError, match="has stopped"):
            append(store, "e3")
        store.reopen()
        assert event_ids(store) == ["e1"]
        append(store, "e4")
        assert event_ids(store) == ["e1", "e4"]


def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    """A child appends as fast as it can and prints each event id once the append has returned."""
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path / "events.db")], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    acknowledged = [next(writer.stdout).strip() for _ in range(200)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    with closing(SqliteStore(tmp_path / "events.db")) as store:
        recorded = store.read_all(limit=100_000)
        assert [one.event_id for one in recorded][: len(acknowledged)] == acknowledged
        assert [one.position for one in recorded] == list(range(1, len(recorded) + 1))


_WRITER = """
import sys
from itertools import count
from pathlib import Path
from tests.events.test_sqlite import SqliteStore, append

store = SqliteStore(Path(sys.argv[1]))
for number in count():
    append(store, f"e{number}")
    print(f"e{number}", flush=True)
"""

"""The event store on disk: one SQLite file in WAL mode, `synchronous=FULL`, opened by one process and nobody else.

It keeps the index of the write-ahead log in its own memory instead of in a file that processes map (`events.db-shm`):
that is what makes WAL work on network file systems. So nobody can read the file meanwhile; `sqlite3 events.db` answers
"database is locked".
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from events.codec import decode
from events.store import NO_STREAM, Recorded, StoreFailedError, StoreLockedError, StreamAppend, place

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    position INTEGER PRIMARY KEY,
    job_id   TEXT NOT NULL,
    version  INTEGER NOT NULL,
    event_id TEXT NOT NULL UNIQUE,
    time     TEXT NOT NULL,
    event    TEXT NOT NULL,
    UNIQUE (job_id, version)
) STRICT
"""
_COLUMNS = "position, job_id, version, event_id, time, event"


class SqliteStore:
    """See `events.store.EventStore`. An append that has returned survives SIGKILL and loss of power.

    Raises StoreLockedError when another process has it open: two writers would each trust their own memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = lock(path.with_name(path.name + ".lock"))
        try:
            self._db = self._open()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise StoreLockedError(f"another process, the sqlite3 shell perhaps, has {path} open") from error
            raise
        self._failed = False

    def append(self, batch: Sequence[StreamAppend], time: datetime) -> list[list[Recorded]]:
        if self._failed:
            raise StoreFailedError(f"{self._path} has stopped after a failed write")
        try:
            known = self.find([event.event_id for stream in batch for event in stream.events])
            versions = self._versions({stream.job_id for stream in batch})
            placed, new = place(batch, known, versions, self._last_position(), time)
            self._write(_row(recorded, body) for recorded, body in new)
        except sqlite3.Error as error:
            self._failed = True
            raise StoreFailedError(f"{self._path}: {error}") from error
        return placed

    def _write(self, rows: Iterable[tuple[int, str, int, str, str, str]]) -> None:
        with self._db:  # one transaction: BEGIN, COMMIT (which fsyncs), ROLLBACK on an error
            self._db.executemany(f"INSERT INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", rows)  # noqa: S608  -- a constant

    def find(self, event_ids: Collection[str]) -> dict[str, Recorded]:
        found = self._select("event_id IN (SELECT value FROM json_each(?))", json.dumps(list(event_ids)))
        return {recorded.event_id: recorded for recorded in found}

    def read_stream(self, job_id: str, after_version: int = -1, limit: int = 1000) -> list[Recorded]:
        return self._select("job_id = ? AND version > ? ORDER BY version LIMIT ?", job_id, after_version, limit)

    def read_all(self, after_position: int = 0, limit: int = 1000) -> list[Recorded]:
        return self._select("position > ? ORDER BY position LIMIT ?", after_position, limit)

    def reopen(self) -> None:
        """After a failed fsync the kernel may hold pages that it takes for clean and the disk never got, and a reader
        sees them. So the whole WAL is copied into the database file, which writes and fsyncs its pages anew: what can
        be read after that is on disk."""
        try:
            self._db.close()
            self._db = self._open()
            busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise StoreFailedError(f"{self._path}: {error}") from error
        if busy:
            raise StoreFailedError(f"{self._path}: the write-ahead log could not be checkpointed")
        self._failed = False

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    def _open(self) -> sqlite3.Connection:
        # Calls come from one thread at a time, but not always from the thread that opened the file.
        db = sqlite3.connect(self._path, timeout=0, check_same_thread=False)  # who opens it may try again
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA locking_mode=EXCLUSIVE")  # before the first access: then no shared memory is ever used
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _SCHEMA_VERSION:
            raise StoreFailedError(f"{self._path} was written by a newer version of Tunewright (schema {version})")
        with db:
            db.execute(_SCHEMA)
            db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")

    def _select(self, where: str, *values: str | int) -> list[Recorded]:
        query = f"SELECT {_COLUMNS} FROM events WHERE {where}"  # noqa: S608  -- constants of this module
        try:
            rows = self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreFailedError(f"{self._path}: {error}") from error
        return [_recorded(*row) for row in rows]

    def _versions(self, job_ids: Collection[str]) -> dict[str, int]:
        last = (
            "SELECT job_id, max(version) FROM events WHERE job_id IN (SELECT value FROM json_each(?)) GROUP BY job_id"
        )
        rows = self._db.execute(last, [json.dumps(list(job_ids))])
        return dict.fromkeys(job_ids, NO_STREAM) | dict(rows.fetchall())

    def _last_position(self) -> int:
        (last,) = self._db.execute("SELECT ifnull(max(position), 0) FROM events").fetchone()
        return int(last)


def lock(path: Path) -> int:
    """Holds `path` until it is closed; the kernel lets go when the process dies, however it dies.

    Raises StoreLockedError when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        raise StoreLockedError(f"another process writes here ({path} is locked)") from error
    return held


def _row(recorded: Recorded, body: str) -> tuple[int, str, int, str, str, str]:
    time = recorded.time.isoformat()
    return recorded.position, recorded.job_id, recorded.version, recorded.event_id, time, body


def _recorded(position: int, job_id: str, version: int, event_id: str, time: str, body: str) -> Recorded:
    return Recorded(position, job_id, version, event_id, datetime.fromisoformat(time), decode(body))

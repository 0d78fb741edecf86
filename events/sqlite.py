"""The event store on disk: one SQLite file in WAL mode, `synchronous=FULL`, opened by one process only.

SQLite keeps the index of the write-ahead log (WAL) in this process's memory instead of a memory-mapped file
(`events.db-shm`), so that WAL works on network file systems, too. No other process can read the file meanwhile:
`sqlite3 events.db` answers "database is locked".

Every event carries a CRC-32 of its columns, which changes with any flipped bit. Positions and versions have no gaps,
and the last position is stored apart from the events, so a missing event is noticed. SQLite silently drops part of a
damaged WAL: `events.wal` notices that, and so does the last acknowledged position, which is in `events.db.lock`. That
position is written without a sync; after a power cut it may be too low, but never too high.

An append writes in two places, whatever jobs it is for: at the end of `events` and in the index of event ids. The
positions of each job's events are in the table `streams` up to the last multiple of _STRIDE, and in memory beyond it.
An index by job that every commit kept up to date would change a page for each job in the commit.
"""

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Collection, Sequence
from contextlib import closing, suppress
from pathlib import Path

from events.disk import sync_path
from events.sqlite_rows import COLUMNS, Row, checksum_of, recorded_of, row_of
from events.sqlite_schema import VERSION, migrate
from events.store import (
    NO_STREAM,
    Damage,
    JobDamagedError,
    Recorded,
    StoreFailedError,
    StoreLockedError,
    check_places,
)
from events.wal import lost_frames

LOG_FILE = "events.db"
"""In the storage directory."""
_ONE = f"SELECT {COLUMNS} FROM events WHERE position = ?"  # noqa: S608  -- constants of this module
_INSERT = f"INSERT INTO events ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  -- constants of this module
_STRIDE = 16384
"""`streams` is extended by this many events at a time, sorted by job, so that each of its pages is written once for
many events. Part of the schema: how far `streams` reaches follows from it and the last position."""
_UNREACHABLE = """
SELECT position, job_id FROM events AS e WHERE position > ? AND position <= ?
AND (SELECT position, job_id, version FROM events INDEXED BY by_event_id WHERE event_id = e.event_id)
    IS NOT (position, job_id, version)
"""
_UNLISTED = """
SELECT position, job_id FROM events AS e WHERE position > ? AND position <= ? AND (
    (SELECT position FROM streams WHERE job_id = e.job_id AND version = e.version) IS NOT e.position
    OR e.version > 0 AND NOT EXISTS (SELECT 1 FROM streams WHERE job_id = e.job_id AND version = e.version - 1)
)
"""
_WAL_BYTES = 16 << 20
"""The write-ahead log is checkpointed when it grows beyond this. A page that many commits have changed is then written
to the database file once."""
_CACHE_KIB = 16 << 10
_CHECKED_AT_ONCE = 500  # events: an append waits for as long as that takes
_BACKUP_PAGES = 64  # copied at a time: an append waits for as long as that takes


class SqliteStore:
    """See `events.store.EventStore`. An append that has returned survives SIGKILL and loss of power.

    Raises StoreLockedError if another process has it open: each of two writers would trust its own memory. Raises
    StoreFailedError if the file can't be read, or if acknowledged events are missing and it is unknown of which jobs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wal = path.with_name(path.name + "-wal")
        self.damage: dict[int, Damage] = {}
        self._copying = threading.Lock()
        self._one_backup = threading.Lock()
        self._failed = False
        self._listed = 0
        """`streams` has the events up to this position ..."""
        self._unlisted: dict[str, dict[int, int]] = {}
        """... and this has those after it: by job, the position of each version, in order."""
        self._lock = lock(path.with_name(path.name + ".lock"))
        try:
            self._acknowledged = _read_mark(self._lock)
            self._open()
        except BaseException as error:
            os.close(self._lock)
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:  # Python's own errors have no code
                raise StoreLockedError(f"another process, the sqlite3 shell perhaps, has {path} open") from error
            if isinstance(error, sqlite3.Error | UnicodeDecodeError):  # an error that quotes the damaged file
                raise StoreFailedError(f"{path} can't be opened: {error}") from error
            raise

    def append(self, batch: Sequence[tuple[Recorded, str]]) -> None:
        if self._failed:
            raise StoreFailedError(f"{self._path} has stopped after a failed write")
        try:
            check_places(batch, self._last, self._last_version)
            if batch:
                self._write(batch)
        except sqlite3.Error as error:
            self._failed = True
            raise StoreFailedError(f"{self._path}: {error}") from error

    def _write(self, batch: Sequence[tuple[Recorded, str]]) -> None:
        last = batch[-1][0].position
        listed = last - last % _STRIDE
        with self._db:  # one transaction: BEGIN, COMMIT (which fsyncs), ROLLBACK on an error
            self._db.executemany(_INSERT, map(row_of, batch))
            if listed > self._listed:
                self._list(batch, listed)
            self._db.execute("UPDATE head SET position = ?, checksum = ?", (last, checksum_of(last)))
        self._last = last
        self._mark(last)
        if listed > self._listed:
            self._listed = listed
            self._unlisted = {
                job_id: rest
                for job_id, places in self._unlisted.items()
                if (rest := {version: position for version, position in places.items() if position > listed})
            }
        for recorded, _ in batch:
            if recorded.position > listed:
                self._unlisted.setdefault(recorded.job_id, {})[recorded.version] = recorded.position
        if self._wal.stat().st_size > _WAL_BYTES:
            self._empty_wal()

    def _list(self, batch: Sequence[tuple[Recorded, str]], through: int) -> None:
        """Extends `streams` up to position `through`, in the transaction that writes the batch."""
        places = [(job_id, *place) for job_id, places in self._unlisted.items() for place in places.items()]
        places += [(recorded.job_id, recorded.version, recorded.position) for recorded, _ in batch]
        due = sorted(place for place in places if place[2] <= through)
        self._db.executemany("INSERT INTO streams (job_id, version, position) VALUES (?, ?, ?)", due)

    def find(self, event_ids: Collection[str]) -> dict[str, Recorded]:
        query = f"SELECT {COLUMNS} FROM events WHERE event_id IN (SELECT value FROM json_each(?))"  # noqa: S608  -- constants
        found: dict[str, Recorded] = {}
        for row in self._select(query, json.dumps(list(event_ids))):
            recorded = recorded_of(row)
            if recorded is None:
                self._note({row[0]: "its checksum is wrong"})
            else:
                found[recorded.event_id] = recorded
        return found

    def read_stream(self, job_id: str, after_version: int = -1, limit: int = 1000) -> list[Recorded]:
        listed = (
            "SELECT e.* FROM streams LEFT JOIN events AS e USING (position) "
            "WHERE streams.job_id = ? AND streams.version > ? ORDER BY streams.version LIMIT ?"
        )
        try:
            rows: list[Row | None] = self._db.execute(listed, (job_id, after_version, limit)).fetchall()
            for version, position in self._unlisted.get(job_id, {}).items():
                if version > after_version and len(rows) < limit:
                    rows.append(self._db.execute(_ONE, (position,)).fetchone())
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise StoreFailedError(f"{self._path}: {error}") from error
            raise JobDamagedError(f"events of job {job_id} can't be read: {error}") from error
        history: list[Recorded] = []
        for version, row in enumerate(rows, max(after_version, NO_STREAM) + 1):
            recorded = recorded_of(row)
            if recorded is None or (recorded.job_id, recorded.version) != (job_id, version):
                raise JobDamagedError(f"event {version} of job {job_id} is damaged or missing")
            history.append(recorded)
        return history

    def read_all(self, after_position: int = 0, limit: int = 1000) -> list[Recorded]:
        after = max(after_position, 0)
        while after < self._last:
            through = min(after + limit, self._last)
            if history := self._range(after, through):
                return history
            after = through
        return []

    def last_position(self) -> int:
        return self._last

    def check(self, after_position: int) -> int:
        through = min(after_position + _CHECKED_AT_ONCE, self._last)
        history = self._range(after_position, through)
        listed = min(through, self._listed)
        unlisted = [recorded for recorded in history if recorded.position > listed and self._is_astray(recorded)]
        no_id = "the index of the event ids does not lead to it"
        no_place = "its job does not lead to it, or to the one before it"
        found = [(position, job_id, no_id) for position, job_id in self._found(_UNREACHABLE, after_position, through)]
        found += [(position, job_id, no_place) for position, job_id in self._found(_UNLISTED, after_position, listed)]
        found += [(recorded.position, recorded.job_id, no_place) for recorded in unlisted]
        for position, job_id, why in found:
            self.damage.setdefault(position, Damage(position, (job_id,), why))
        return through

    def integrity(self) -> list[str]:
        """Problems that SQLite itself finds in the whole file. Takes as long as reading the file a few times."""
        try:
            found = [str(line) for (line,) in self._db.execute("PRAGMA integrity_check")]
        except (sqlite3.Error, UnicodeDecodeError) as error:
            return [str(error)]
        return [] if found == ["ok"] else found

    def snapshot(self) -> bytes | None:
        try:
            return self._snapshot_file.read_bytes()
        except OSError:
            return None

    def keep_snapshot(self, snapshot: bytes) -> None:
        partial = self._snapshot_file.with_name(self._snapshot_file.name + ".partial")
        try:
            with partial.open("wb") as file:
                file.write(snapshot)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._snapshot_file)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise

    @property
    def _snapshot_file(self) -> Path:
        return self._path.with_name(self._path.name + ".snapshot")

    def backup(self, file: Path) -> None:
        """SQLite also copies what this connection writes meanwhile, and never part of a transaction."""
        with self._one_backup:  # two into the same file would write to the same partial one
            self._backup(file)

    def _backup(self, file: Path) -> None:
        if file.exists():
            raise FileExistsError(f"{file} exists")
        partial = file.with_name(file.name + ".partial")
        partial.unlink(missing_ok=True)
        try:
            with self._copying, closing(sqlite3.connect(partial)) as copy:
                copy.execute("PRAGMA synchronous=OFF")  # it is synced once, below
                self._db.backup(copy, pages=_BACKUP_PAGES, progress=self._go_on, sleep=0.002)
            sync_path(partial)
            partial.rename(file)
            sync_path(file.parent)
        except sqlite3.Error as error:
            raise StoreFailedError(f"{file} could not be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    def _go_on(self, _status: int, _remaining: int, _total: int) -> None:
        if self._failed:
            raise StoreFailedError(f"{self._path} has stopped, and the backup with it")

    def reopen(self) -> None:
        """After a failed fsync the kernel may hold pages that it considers clean although they never reached the disk,
        and reads return them. So the whole WAL is copied into the database file, which writes and fsyncs its pages
        anew: everything that can be read after that is on disk."""
        self._failed = True
        try:
            with self._copying:
                self._db.close()
                self._open()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise StoreFailedError(f"{self._path}: {error}") from error
        self._failed = False

    def close(self) -> None:
        self._failed = True  # ends a backup that is under way
        with self._copying:
            self._db.close()
        os.close(self._lock)

    def _open(self) -> None:
        is_new = not self._path.exists()
        # Calls come from one thread at a time, but not always the one that opened the file; and `backup` runs beside
        # them.
        self._db = sqlite3.connect(self._path, timeout=0, check_same_thread=False)  # the caller may try again
        try:
            self._prepare()
            self._read_unlisted()
        except BaseException:
            self._db.close()
            raise
        if is_new:
            sync_path(self._path.parent)

    def _prepare(self) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode=EXCLUSIVE")  # before the first access, so that no shared memory is used
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        db.execute("PRAGMA wal_autocheckpoint=0")  # `events.wal` needs it emptied as a whole: `_empty_wal`
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise StoreFailedError(f"{self._path} was written by a newer version of Tunewright (schema {version})")
        _, recovered, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if lost := lost_frames(self._wal, max(recovered, 0)):
            raise StoreFailedError(
                f"{self._wal}: {lost}. Acknowledged events are in it and can't be read. Restore a backup, or "
                f"move that file and {self._path.name}.lock away to go on without them"
            )
        if not self._empty_wal():
            raise StoreFailedError(f"{self._path}: the write-ahead log could not be checkpointed")
        migrate(db, self._path, version, _STRIDE)
        self._last = self._read_head()
        if self._last < self._acknowledged:
            raise StoreFailedError(
                f"{self._path}: events up to position {self._acknowledged} were acknowledged, it ends at {self._last}. "
                f"Restore a backup, or move {self._path.name}.lock away to go on without (also after restoring one)"
            )

    def _read_head(self) -> int:
        """The last position; if its record is damaged, that of the last event in the table."""
        head = self._db.execute("SELECT position, checksum FROM head").fetchone()
        if head is not None and checksum_of(head[0]) == head[1]:
            return int(head[0])
        (last,) = self._db.execute("SELECT ifnull(max(position), 0) FROM events").fetchone()
        self.damage[0] = Damage(0, (), f"the record of the last position is; events may be missing behind {last}")
        return int(last)

    def _empty_wal(self) -> bool:
        busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def _mark(self, position: int) -> None:
        self._acknowledged = position
        with suppress(OSError):  # it only helps to find damage
            os.pwrite(self._lock, b"%020d %010d\n" % (position, checksum_of(position)), 0)

    def _range(self, after: int, through: int) -> list[Recorded]:
        """The undamaged events of these positions. The others are noted as damaged."""
        query = f"SELECT {COLUMNS} FROM events WHERE position > ? AND position <= ? ORDER BY position"  # noqa: S608  -- constants
        try:
            rows = self._db.execute(query, (after, through)).fetchall()
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise StoreFailedError(f"{self._path}: {error}") from error
            rows = []
        history = [recorded for row in rows if (recorded := recorded_of(row)) is not None]
        if [recorded.position for recorded in history] == list(range(after + 1, through + 1)):
            return history
        return self._one_by_one(after, through)

    def _one_by_one(self, after: int, through: int) -> list[Recorded]:
        history: list[Recorded] = []
        damaged: dict[int, str] = {}
        for position in range(after + 1, through + 1):
            try:
                row = self._db.execute(_ONE, (position,)).fetchone()
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise StoreFailedError(f"{self._path}: {error}") from error
                damaged[position] = str(error)
                continue
            recorded = recorded_of(row)
            if recorded is None or recorded.position != position:
                damaged[position] = "it is missing" if row is None else "its checksum is wrong"
            else:
                history.append(recorded)
        self._note(damaged)
        return history

    def _note(self, damaged: dict[int, str]) -> None:
        """Records damage by position. The indexes, which store job and position apart from the event, tell whose it
        is."""
        owners: dict[int, tuple[str, ...]] = {}
        for job_id, _, position in self._places(damaged):
            if str(job_id) not in owners.get(position, ()):
                owners[position] = (*owners.get(position, ()), str(job_id))
        for position, why in damaged.items():
            self.damage.setdefault(position, Damage(position, owners.get(position, ()), why))

    def _places(self, positions: Collection[int]) -> list[tuple[str, int, int]]:
        """Job, version and position of these events, from each index that can be read."""
        columns, at = "job_id, version, position", "position IN (SELECT value FROM json_each(?))"
        places: list[tuple[str, int, int]] = []
        for index in ("streams", "events INDEXED BY by_event_id"):
            with suppress(sqlite3.Error):
                places += self._db.execute(f"SELECT {columns} FROM {index} WHERE {at}", [json.dumps(list(positions))])  # noqa: S608  -- constants
        return places

    def _read_unlisted(self) -> None:
        self._listed = self._last - self._last % _STRIDE
        history = self._range(self._listed, self._last)
        places = [(recorded.job_id, recorded.version, recorded.position) for recorded in history]
        if len(places) < self._last - self._listed:
            damaged = set(range(self._listed + 1, self._last + 1)) - {position for _, _, position in places}
            places += [place for place in self._places(damaged) if list(map(type, place)) == [str, int, int]]
        self._unlisted = {}
        for job_id, version, position in sorted(places):
            self._unlisted.setdefault(job_id, {})[version] = position

    def _is_astray(self, recorded: Recorded) -> bool:
        """Whether an event beyond `streams`, or the one before it in its job, can't be found by its job."""
        places = self._unlisted.get(recorded.job_id, {})
        if places.get(recorded.version) != recorded.position:
            return True
        before = recorded.version - 1
        return before not in places and before != self._last_listed_version(recorded.job_id)

    def _found(self, query: str, after: int, through: int) -> list[tuple[int, str]]:
        """Position and job of the events that the query (_UNREACHABLE or _UNLISTED) finds in (after, through]. If an
        index can't be read in places, also the events that need those places."""
        try:
            return self._db.execute(query, (after, through)).fetchall()
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise StoreFailedError(f"{self._path}: {error}") from error
        found: list[tuple[int, str]] = []
        for recorded in self._range(after, through):
            try:
                found += self._db.execute(query, (recorded.position - 1, recorded.position))
            except sqlite3.Error:
                found.append((recorded.position, recorded.job_id))
        return found

    def _select(self, query: str, *values: str | int) -> list[Row]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreFailedError(f"{self._path}: {error}") from error

    def _last_version(self, job_id: str) -> int:
        places = self._unlisted.get(job_id)
        return next(reversed(places)) if places else self._last_listed_version(job_id)

    def _last_listed_version(self, job_id: str) -> int:
        return self._select("SELECT ifnull(max(version), -1) FROM streams WHERE job_id = ?", job_id)[0][0]


def lock(path: Path) -> int:
    """Locks `path` and returns the open file, which holds the lock until it is closed or the process dies.

    Raises StoreLockedError if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        raise StoreLockedError(f"another process writes here ({path} is locked)") from error
    return held


def _read_mark(held: int) -> int:
    """The last acknowledged position in the lock file; 0 if it has none."""
    try:
        position, checksum = map(int, os.pread(held, 64, 0).split())
    except ValueError:
        return 0
    return position if checksum_of(position) == checksum else 0


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the contents of the file are the cause, and not an error in reading it."""
    if isinstance(error, sqlite3.OperationalError) and "decode to UTF-8" in str(error):
        return True
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

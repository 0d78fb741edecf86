"""The SQLite file of webhooks: its tables, and how it is opened."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

_LOCK_WAIT_S = 20.0  # the previous process may need a moment to end
_SCHEMA = """
CREATE TABLE IF NOT EXISTS endpoints (
    number           INTEGER PRIMARY KEY AUTOINCREMENT,
    id               TEXT NOT NULL UNIQUE,
    name             TEXT NOT NULL,
    url              TEXT NOT NULL,
    event_types      TEXT NOT NULL,
    created_at       REAL NOT NULL,
    updated_at       REAL NOT NULL,
    enabled          INTEGER NOT NULL DEFAULT 1,
    secret           TEXT NOT NULL,
    old_secret       TEXT,  -- this and the next column: used by earlier versions, which kept one old secret
    old_secret_until REAL
) STRICT;
CREATE TABLE IF NOT EXISTS deleted_endpoints (
    id         TEXT PRIMARY KEY,
    number     INTEGER NOT NULL,
    deleted_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS old_secrets (
    endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
    secret      TEXT NOT NULL,
    until       REAL NOT NULL
) STRICT;
BEGIN;
INSERT INTO old_secrets SELECT id, old_secret, old_secret_until FROM endpoints WHERE old_secret IS NOT NULL;
UPDATE endpoints SET old_secret = NULL, old_secret_until = NULL WHERE old_secret IS NOT NULL;
COMMIT;
CREATE TABLE IF NOT EXISTS deliveries (
    number           INTEGER PRIMARY KEY AUTOINCREMENT,
    endpoint_id      TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
    event_id         TEXT NOT NULL,
    event_type       TEXT NOT NULL,
    job_id           TEXT NOT NULL,
    created_at       REAL NOT NULL,
    status           TEXT NOT NULL DEFAULT 'pending',
    attempts         INTEGER NOT NULL DEFAULT 0,
    last_attempt_at  REAL,
    next_attempt_at  REAL,
    last_status_code INTEGER,
    last_error       TEXT,
    UNIQUE (endpoint_id, event_id)
) STRICT;
CREATE INDEX IF NOT EXISTS due ON deliveries (endpoint_id, next_attempt_at) WHERE status = 'pending';
CREATE TABLE IF NOT EXISTS cursor (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    position INTEGER NOT NULL,
    event_id TEXT NOT NULL
) STRICT;
"""


def connect(path: Path) -> sqlite3.Connection:
    """Opens the file. Creates it if there is none, and updates one that an earlier version wrote. Only its owner may
    read it. Raises sqlite3.Error and OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    path.chmod(0o600)  # SQLite gives the write-ahead log the same mode
    db = sqlite3.connect(path, timeout=_LOCK_WAIT_S, check_same_thread=False)  # not always the same thread
    db.row_factory = sqlite3.Row
    try:
        # As for the event log: with an exclusive lock SQLite needs no shared memory, so a network file system will do.
        # The checkpoint writes and syncs again what a failed sync may have left in the write-ahead log.
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON",
                       "wal_checkpoint(TRUNCATE)"):  # fmt: skip
            db.execute(f"PRAGMA {pragma}")
        db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db

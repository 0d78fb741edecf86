"""The tables of the event store on disk, and the migration from earlier versions."""

import sqlite3
from pathlib import Path

from events.sqlite_rows import COLUMNS, checksum_of
from events.store import StoreFailedError

VERSION = 3
SCHEMA = {
    "events": """CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    job_id   TEXT NOT NULL,
    version  INTEGER NOT NULL,
    event_id TEXT NOT NULL,
    time     TEXT NOT NULL,
    event    TEXT NOT NULL,
    checksum INTEGER NOT NULL
) STRICT""",
    # It also stores the job: if the event itself is damaged, the index still tells whose it is.
    "by_event_id": "CREATE INDEX by_event_id ON events (event_id, job_id, version)",
    "streams": """CREATE TABLE streams (
    job_id   TEXT NOT NULL,
    version  INTEGER NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (job_id, version)
) STRICT, WITHOUT ROWID""",
    "head": """CREATE TABLE head (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    position INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) STRICT""",
}


def migrate(db: sqlite3.Connection, path: Path, version: int, stride: int) -> None:
    """Brings the tables of schema `version` (0: there are none yet) up to date. `stride` as in `events.sqlite`. Raises
    StoreFailedError if the tables are not those of the schema."""
    schema = dict(db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
    if schema == SCHEMA:
        return
    if schema and (version not in (1, 2) or "streams" in schema):
        raise StoreFailedError(f"{path} is damaged, or no event log: its tables are not those of schema 3")
    db.create_function("checksum", -1, checksum_of, deterministic=True)
    with db:
        db.execute("BEGIN IMMEDIATE")
        if schema:
            db.execute("ALTER TABLE events RENAME TO events_before")
        for name, sql in SCHEMA.items():
            if name != "head" or version < 2:
                db.execute(sql)
        if schema:
            of_1 = "position, job_id, version, event_id, time, event"
            columns = f"{of_1}, checksum({of_1})" if version == 1 else COLUMNS
            db.execute(f"INSERT INTO events SELECT {columns} FROM events_before ORDER BY position")  # noqa: S608  -- constants
            db.execute(
                "INSERT INTO streams SELECT job_id, version, position FROM events_before "
                "WHERE position <= (SELECT max(position) / ? * ? FROM events) ORDER BY job_id, version",
                (stride, stride),
            )
            db.execute("DROP TABLE events_before")
        if version < 2:
            db.execute(
                "INSERT INTO head SELECT 1, last, checksum(last) "
                "FROM (SELECT ifnull(max(position), 0) AS last FROM events)"
            )
        db.execute(f"PRAGMA user_version={VERSION}")

"""Webhook endpoints and deliveries, in one SQLite file that a single process has open.

It holds the endpoints' secrets, so only its owner may read it (mode 0600). When a method returns, its changes are on
disk. The event log is the source of truth: the cursor says how far it has been read, and moves in the same transaction
that adds the deliveries found there.
"""

import base64
import json
import secrets
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ulid import ULID

from trainers.errors import UserError
from trainers.webhooks.schema import connect

EventType = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
DeliveryStatus = Literal["pending", "delivered", "failed"]
MOST_ENDPOINTS = 50
MOST_OLD_SECRETS = 10
"""Maximum number of valid old secrets of an endpoint. Each adds a signature to the header of every request."""


class Cursor(NamedTuple):
    """How far the log has been read: its last event that was read."""

    position: int
    event_id: str
    """The id of that event; empty at position 0. If the log has another event there, it is another log."""


class Notice(NamedTuple):
    """The news that a job is over. It has the same id for each endpoint and each attempt."""

    event_id: str
    event_type: EventType
    job_id: str
    time: float
    """When the job's end was recorded, Unix seconds."""

    @property
    def body(self) -> str:
        """The request's body, in OpenAI's format."""
        event = {
            "id": self.event_id,
            "object": "event",
            "created_at": int(self.time),
            "type": self.event_type,
            "data": {"id": self.job_id},
        }
        return json.dumps(event)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A URL that is called, and for which events. Times are Unix seconds."""

    id: str
    name: str
    url: str
    event_types: tuple[EventType, ...]
    created_at: float
    updated_at: float
    enabled: bool
    signing_secret_hint: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """A notice on its way to an endpoint. Times are Unix seconds."""

    notice: Notice
    status: DeliveryStatus
    attempts: int
    last_attempt_at: float | None
    next_attempt_at: float | None
    """None: no attempt will follow."""
    last_status_code: int | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """A notice to be sent to an endpoint now."""

    endpoint_id: str
    url: str
    notice: Notice
    attempts: int
    """Number of attempts, with this one."""
    secrets: tuple[str, ...] = field(repr=False)
    """What it is to be signed with: the endpoint's secret, and the old ones that are still valid."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of an attempt."""

    status: DeliveryStatus
    status_code: int | None
    error: str | None
    next_attempt_at: float | None
    disable: bool = False
    """Whether the endpoint is to be disabled."""


class WebhookStore:
    """All methods block, and raise sqlite3.Error if the file can't be read or written."""

    def __init__(self, path: Path) -> None:
        self._db = connect(path)

    def close(self) -> None:
        self._db.close()

    # --- endpoints

    def has_endpoints(self) -> bool:
        return self._one("SELECT 1 FROM endpoints LIMIT 1") is not None

    def create(
        self,
        endpoint_id: str,
        secret: str,
        name: str,
        url: str,
        event_types: Sequence[EventType],
        now: float,
        begin: Cursor | None = None,
    ) -> Endpoint:
        """Creates an endpoint for events from `now` on. If it exists already, changes nothing. `begin`: where to read
        the log from, if there was no endpoint before.

        Raises UserError `too_many_webhook_endpoints`.
        """
        with self._db:
            if self._one("SELECT 1 FROM endpoints WHERE id = ?", endpoint_id) is not None:
                return self.endpoint(endpoint_id)
            (count,) = self._db.execute("SELECT count(*) FROM endpoints").fetchone()
            if count >= MOST_ENDPOINTS:
                raise UserError(
                    "too_many_webhook_endpoints", f"there are {count} webhook endpoints already: delete one first"
                )
            if begin is not None and count == 0:
                self._move(begin)
            self._db.execute(
                "INSERT INTO endpoints (id, name, url, event_types, created_at, updated_at, secret) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (endpoint_id, name, url, json.dumps(event_types), now, now, secret),
            )
        return self.endpoint(endpoint_id)

    def endpoint(self, endpoint_id: str) -> Endpoint:
        """Raises UserError `webhook_endpoint_not_found`, like all methods that take the id of an endpoint."""
        return _endpoint(self._endpoint_row(endpoint_id))

    def endpoints(self, limit: int, after: str | None) -> tuple[list[Endpoint], bool]:
        """Up to `limit` endpoints older than `after`, newest first, and whether there are more. `after` may have been
        deleted meanwhile. Raises UserError `unknown_after`."""
        query = (
            "SELECT number FROM endpoints WHERE id = ? UNION ALL SELECT number FROM deleted_endpoints WHERE id = ? "
            "ORDER BY number DESC LIMIT 1"  # an id that was deleted and created again is in both tables
        )
        before = self._number(query, after, after, after)
        rows = self._db.execute(
            "SELECT * FROM endpoints WHERE number < ? ORDER BY number DESC LIMIT ?", (before, limit + 1)
        ).fetchall()
        return [_endpoint(row) for row in rows[:limit]], len(rows) > limit

    def update(
        self, endpoint_id: str, name: str | None, url: str | None, event_types: Sequence[EventType] | None, now: float
    ) -> Endpoint:
        """Changes whatever is not None, and enables the endpoint if it was disabled."""
        before = self.endpoint(endpoint_id)
        after = (
            name or before.name,
            url or before.url,
            json.dumps(before.event_types if event_types is None else event_types),
        )
        if not before.enabled or after != (before.name, before.url, json.dumps(before.event_types)):
            with self._db:
                self._db.execute(
                    "UPDATE endpoints SET name = ?, url = ?, event_types = ?, updated_at = ?, enabled = 1 WHERE id = ?",
                    (*after, now, endpoint_id),
                )
        return self.endpoint(endpoint_id)

    def rotate(self, endpoint_id: str, secret: str, now: float, old_secret_until: float | None) -> Endpoint:
        """Sets a new secret, unless it is set already. Until `old_secret_until` the secret so far also signs, and so do
        older ones, each until its own time. None: from now on only the new one signs.

        Raises UserError `too_many_webhook_secrets`.
        """
        old = self._endpoint_row(endpoint_id)["secret"]
        if old == secret:
            return self.endpoint(endpoint_id)
        with self._db:
            self._db.execute(
                "DELETE FROM old_secrets WHERE endpoint_id = ? AND (until <= ? OR ?)",
                (endpoint_id, now, old_secret_until is None),
            )
            if old_secret_until is not None:
                (count,) = self._one("SELECT count(*) FROM old_secrets WHERE endpoint_id = ?", endpoint_id)
                if count >= MOST_OLD_SECRETS:
                    raise UserError(
                        "too_many_webhook_secrets",
                        f"the endpoint has {count} old secrets that are still signed with: wait until one expires, or "
                        "rotate without keep_old_secret_active_for_24_hours, which ends them all",
                    )
                self._db.execute("INSERT INTO old_secrets VALUES (?, ?, ?)", (endpoint_id, old, old_secret_until))
            self._db.execute("UPDATE endpoints SET secret = ?, updated_at = ? WHERE id = ?", (secret, now, endpoint_id))
        return self.endpoint(endpoint_id)

    def secrets(self, endpoint_id: str, now: float) -> tuple[str, ...]:
        """The secrets to sign with: the endpoint's own, then the old ones that are still valid, latest first."""
        rows = self._db.execute(
            "SELECT secret FROM old_secrets WHERE endpoint_id = ? AND until > ? ORDER BY until DESC", (endpoint_id, now)
        )
        return (self._endpoint_row(endpoint_id)["secret"], *(row["secret"] for row in rows))

    def delete(self, endpoint_id: str, now: float) -> None:
        """Deletes the endpoint with its secrets and deliveries. Its place in the list is kept, for `endpoints`."""
        number = self._endpoint_row(endpoint_id)["number"]
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO deleted_endpoints VALUES (?, ?, ?)", (endpoint_id, number, now))
            self._db.execute("DELETE FROM endpoints WHERE id = ?", (endpoint_id,))

    # --- deliveries

    def deliveries(self, endpoint_id: str, limit: int, after: str | None) -> tuple[list[Delivery], bool]:
        """Up to `limit` deliveries older than `after`, newest first, and whether there are more. Raises UserError
        `unknown_after`."""
        self._endpoint_row(endpoint_id)
        query = "SELECT number FROM deliveries WHERE endpoint_id = ? AND event_id = ?"
        before = self._number(query, after, endpoint_id, after)
        rows = self._db.execute(
            "SELECT * FROM deliveries WHERE endpoint_id = ? AND number < ? ORDER BY number DESC LIMIT ?",
            (endpoint_id, before, limit + 1),
        ).fetchall()
        return [_delivery(row) for row in rows[:limit]], len(rows) > limit

    def redeliver(self, endpoint_id: str, event_id: str, now: float) -> Delivery:
        """Makes the delivery due now, with all its attempts before it again. Raises UserError
        `webhook_delivery_not_found` or `webhook_endpoint_disabled`."""
        endpoint = self.endpoint(endpoint_id)
        self._delivery_row(endpoint_id, event_id)
        if not endpoint.enabled:
            raise UserError(
                "webhook_endpoint_disabled", "the endpoint answered 410 Gone and is disabled: update it first"
            )
        with self._db:
            self._db.execute(
                "UPDATE deliveries SET status = 'pending', attempts = 0, next_attempt_at = ? "
                "WHERE endpoint_id = ? AND event_id = ?",
                (now, endpoint_id, event_id),
            )
        return _delivery(self._delivery_row(endpoint_id, event_id))

    def cursor(self) -> Cursor:
        row = self._one("SELECT position, event_id FROM cursor")
        return Cursor(0, "") if row is None else Cursor(*row)

    def note(self, notices: Sequence[Notice], cursor: Cursor, now: float) -> None:
        """Adds a delivery, due now, of each notice to each enabled endpoint that wants it, and moves the cursor.
        Notices that were added before, or are older than the endpoint, are skipped. (A notice's time may be ahead of
        `now`: the log's time never goes back, whatever the clock does.)"""
        with self._db:
            for row in self._db.execute("SELECT * FROM endpoints WHERE enabled").fetchall():
                endpoint = _endpoint(row)
                self._db.executemany(
                    "INSERT OR IGNORE INTO deliveries (endpoint_id, event_id, event_type, job_id, created_at, "
                    "next_attempt_at) VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (endpoint.id, *notice, min(notice.time, now))
                        for notice in notices
                        if notice.event_type in endpoint.event_types and notice.time >= endpoint.created_at
                    ],
                )
            self._move(cursor)

    def clock_was_set_back(self, now: float) -> None:
        """Makes pending deliveries due now if their times are of a clock that was ahead of this one: their pause would
        last longer by as much."""
        with self._db:
            self._db.execute(
                "UPDATE deliveries SET next_attempt_at = ? "
                "WHERE status = 'pending' AND ifnull(last_attempt_at, next_attempt_at) > ?",
                (now, now),
            )

    def claim(
        self, now: float, in_flight: Mapping[str, int], most: int, hold_s: Callable[[int], float]
    ) -> tuple[list[Attempt], float | None]:
        """Attempts for the deliveries that are due now, up to `most` in flight for each endpoint, and the time at which
        the next one will be due.

        They count as made from here on. If `settle` isn't called, they are due again after `hold_s(attempts)`.
        """
        claimed: list[Attempt] = []
        due: list[float] = []
        with self._db:
            for row in self._db.execute("SELECT * FROM endpoints WHERE enabled").fetchall():
                room = most - in_flight.get(row["id"], 0)
                if room <= 0:
                    continue  # when one of its attempts ends, this is called again
                pending = self._db.execute(
                    "SELECT * FROM deliveries WHERE endpoint_id = ? AND status = 'pending' "
                    "ORDER BY next_attempt_at LIMIT ?",
                    (row["id"], room),
                ).fetchall()
                ready = [delivery for delivery in pending if delivery["next_attempt_at"] <= now]
                claimed += [self._claimed(row, delivery, now, hold_s) for delivery in ready]
                due += [delivery["next_attempt_at"] for delivery in pending[len(ready) :]]
        return claimed, min(due, default=None)

    def _claimed(
        self, endpoint: sqlite3.Row, delivery: sqlite3.Row, now: float, hold_s: Callable[[int], float]
    ) -> Attempt:
        attempts = delivery["attempts"] + 1
        self._db.execute(
            "UPDATE deliveries SET attempts = ?, last_attempt_at = ?, next_attempt_at = ? WHERE number = ?",
            (attempts, now, now + hold_s(attempts), delivery["number"]),
        )
        secrets = self.secrets(endpoint["id"], now)
        return Attempt(endpoint["id"], endpoint["url"], _notice(delivery), attempts, secrets)

    def settle(self, attempt: Attempt, outcome: Outcome) -> None:
        """Records the outcome of an attempt. Does nothing if the endpoint was deleted meanwhile, or if the URL that
        wants it disabled is not its URL any more: then the delivery is due again as if the outcome were unknown."""
        key = attempt.endpoint_id, attempt.notice.event_id
        with self._db:
            if outcome.disable:
                at = attempt.endpoint_id, attempt.url
                if self._db.execute("UPDATE endpoints SET enabled = 0 WHERE id = ? AND url = ?", at).rowcount == 0:
                    return
            # `redeliver` may cause two attempts at one time. If one arrives, the delivery is done. If the first fails,
            # the second one, which has not begun (attempts = 0), is neither put off nor given up.
            self._db.execute(
                "UPDATE deliveries SET status = ?, last_status_code = ?, last_error = ?, next_attempt_at = ? "
                "WHERE endpoint_id = ? AND event_id = ? AND status != 'delivered' "
                "AND (attempts > 0 OR ? = 'delivered')",
                (outcome.status, outcome.status_code, outcome.error, outcome.next_attempt_at, *key, outcome.status),
            )
            # This also ends deliveries that were in flight when the endpoint was disabled.
            self._db.execute(
                "UPDATE deliveries SET status = 'failed', next_attempt_at = NULL WHERE status = 'pending' "
                "AND endpoint_id = (SELECT id FROM endpoints WHERE id = ? AND NOT enabled)",
                (attempt.endpoint_id,),
            )

    def prune(self, before: float) -> None:
        """Deletes what is older than that time: deliveries that aren't pending, and the places of deleted endpoints."""
        with self._db:
            self._db.execute("DELETE FROM deleted_endpoints WHERE deleted_at < ?", (before,))
            self._db.execute("DELETE FROM deliveries WHERE status != 'pending' AND created_at < ?", (before,))

    def _move(self, cursor: Cursor) -> None:
        self._db.execute("INSERT OR REPLACE INTO cursor VALUES (1, ?, ?)", cursor)

    def _one(self, query: str, *values: object) -> Any:  # noqa: ANN401  -- a row, or None
        return self._db.execute(query, values).fetchone()

    def _endpoint_row(self, endpoint_id: str) -> sqlite3.Row:
        row: sqlite3.Row | None = self._one("SELECT * FROM endpoints WHERE id = ?", endpoint_id)
        if row is None:
            raise UserError(
                "webhook_endpoint_not_found", f"there is no webhook endpoint {endpoint_id!a}", "webhook_endpoint_id"
            )
        return row

    def _delivery_row(self, endpoint_id: str, event_id: str) -> sqlite3.Row:
        query = "SELECT * FROM deliveries WHERE endpoint_id = ? AND event_id = ?"
        row: sqlite3.Row | None = self._one(query, endpoint_id, event_id)
        if row is None:
            message = f"the endpoint has no delivery {event_id!a}: it is too old, or never was"
            raise UserError("webhook_delivery_not_found", message, "delivery_id")
        return row

    def _number(self, query: str, after: str | None, *values: object) -> int:
        """The number in `after`'s row; more than any for None. Raises UserError `unknown_after`."""
        if after is None:
            return 1 << 62
        row = self._one(query, *values)
        if row is None:
            raise UserError("unknown_after", f"after: there is no {after!a} in this list", "after")
        return int(row[0])


def new_endpoint_id() -> str:
    """A new id. If creating the endpoint is tried again, use the same id and secret, so that there is no second one."""
    return f"we_{ULID()}"


def new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(24)).decode()}"


def _endpoint(row: sqlite3.Row) -> Endpoint:
    return Endpoint(
        id=row["id"],
        name=row["name"],
        url=row["url"],
        event_types=tuple(json.loads(row["event_types"])),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        enabled=bool(row["enabled"]),
        signing_secret_hint=f"whsec_...{row['secret'][-4:]}",
    )


def _notice(row: sqlite3.Row) -> Notice:
    return Notice(row["event_id"], row["event_type"], row["job_id"], row["created_at"])


def _delivery(row: sqlite3.Row) -> Delivery:
    return Delivery(
        notice=_notice(row),
        status=row["status"],
        attempts=row["attempts"],
        last_attempt_at=row["last_attempt_at"],
        next_attempt_at=row["next_attempt_at"],
        last_status_code=row["last_status_code"],
        last_error=row["last_error"],
    )

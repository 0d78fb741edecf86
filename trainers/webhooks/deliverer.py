"""Sends webhooks: the end of each job at least once to each endpoint that asked for it.

One loop follows the event log and stores deliveries; another one sends the deliveries that are due. Each step is on
disk before the next one begins, so the process may be killed at any moment: events whose deliveries were not stored yet
are read from the log again, and a delivery that was being sent is sent again, with the same id, after its usual pause.
"""

import asyncio
import hashlib
import logging
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeVar
from uuid import uuid4

import httpx
from standardwebhooks import Webhook

from events.actors import AnyLog
from events.facts import DataRejected, JobCancelled, JobFailed, JobSucceeded
from events.log import LogUnavailable
from events.store import Recorded
from trainers.errors import UserError
from trainers.settings import Settings
from trainers.webhooks.store import (
    Attempt,
    Cursor,
    Delivery,
    Endpoint,
    EventType,
    Notice,
    Outcome,
    WebhookStore,
)
from trainers.webhooks.targets import Resolve, Resolver, TargetRefused, addresses_of, parse

T = TypeVar("T")
logger = logging.getLogger("tunewright.webhooks")

EVENT_TYPES: dict[type, EventType] = {
    JobSucceeded: "fine_tuning.job.succeeded",
    JobFailed: "fine_tuning.job.failed",
    DataRejected: "fine_tuning.job.failed",
    JobCancelled: "fine_tuning.job.cancelled",
}
OLD_SECRET_S = 24 * 3600.0
"""How long an old secret still signs after a rotation that keeps it. So a rotation that is repeated because its answer
was lost doesn't end the secret that the receiver has."""
GONE = 410
_PAGE = 1000
_LOG_WAIT_S = 30.0
_BETWEEN_READS_S = 0.2
"""Minimum time between two reads of the log, so that events appended in a burst are read together."""
_CURSOR_LAG = 10_000
"""After this many events without a delivery the cursor is stored anyway. At most so many are read again after a
restart."""
_LOOK_AGAIN_S = 60.0
"""Due deliveries are looked for at least this often, in case the clock was set."""
_PRUNE_EVERY_S = 3600.0
_AFTER_FAILURE_S = 1.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Schedule and limits of attempts. With the defaults the attempts of a delivery spread over about three days:
    after 5 s, 15 s, 45 s, 2 min, 7 min, 20 min, 1 h, 3 h, 9 h, and then each 12 h."""

    first_pause_s: float = 5.0
    growth: float = 3.0
    longest_pause_s: float = 12 * 3600.0
    jitter: float = 0.2
    """A pause is up to this share shorter or longer, so that what failed together is not tried again together."""
    attempts: int = 15
    timeout_s: float = 15.0
    """Time-out of an attempt, from resolving the name to the status line."""
    in_flight: int = 8
    """Attempts at one time for one endpoint. Endpoints don't wait for each other."""
    kept_s: float = 30 * 24 * 3600.0
    """Deliveries that are over are listed for this long after their event."""

    def pause_s(self, attempts: int) -> float:
        """The pause after this many attempts."""
        pause = min(self.first_pause_s * self.growth ** (attempts - 1), self.longest_pause_s)
        return pause * random.uniform(1 - self.jitter, 1 + self.jitter)  # noqa: S311  -- no secret


class WebhooksUnavailable(Exception):
    """The file of endpoints and deliveries can't be read or written. A change was not made, or not completely."""


class Webhooks:
    """Manages the endpoints and sends deliveries to them. All methods must be called on one event loop.

    They raise UserError for requests that can't be fulfilled, WebhooksUnavailable, and LogUnavailable if they need the
    event log.
    """

    def __init__(
        self,
        log: AnyLog,
        settings: Settings,
        pace: Pace | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        self._log = log
        self._path = settings.webhooks
        self._allowed = settings.allowed_webhook_networks
        self._pace = pace or Pace()
        self._resolver = Resolver()
        self._resolve = resolve or self._resolver
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="webhooks")  # all store calls, one at a time
        self._store: WebhookStore | None = None
        self._created = asyncio.Event()
        self._due = asyncio.Event()
        self._in_flight: Counter[str] = Counter()
        self._attempts: set[asyncio.Task[None]] = set()
        self._pruned = float("-inf")
        self._looked = float("inf")
        """When due deliveries were last looked for. First inf: the clock may have been set back while nothing ran."""

    # --- what the API offers

    async def create(
        self, endpoint_id: str, secret: str, name: str, url: str, event_types: list[EventType]
    ) -> Endpoint:
        """Creates an endpoint for jobs that end from now on. May be repeated with the same id."""
        await self._check(url)
        begin = None
        if not await self._do(WebhookStore.has_endpoints):
            begin = await self._cursor_at((await self._log.live_jobs()).position)
        created = await self._do(
            lambda store: store.create(endpoint_id, secret, name, url, event_types, time.time(), begin)
        )
        self._created.set()
        return created

    async def secret(self, endpoint_id: str) -> str:
        """The current secret of the endpoint."""
        return (await self._do(lambda store: store.secrets(endpoint_id, time.time())))[0]

    async def endpoints(self, limit: int, after: str | None) -> tuple[list[Endpoint], bool]:
        return await self._do(lambda store: store.endpoints(limit, after))

    async def endpoint(self, endpoint_id: str) -> Endpoint:
        return await self._do(lambda store: store.endpoint(endpoint_id))

    async def update(
        self, endpoint_id: str, name: str | None, url: str | None, event_types: list[EventType] | None
    ) -> Endpoint:
        """Changes whatever is not None, and enables the endpoint."""
        await self.endpoint(endpoint_id)
        if url is not None:
            await self._check(url)
        return await self._do(lambda store: store.update(endpoint_id, name, url, event_types, time.time()))

    async def delete(self, endpoint_id: str) -> None:
        await self._do(lambda store: store.delete(endpoint_id, time.time()))

    async def rotate(self, endpoint_id: str, secret: str, *, keep_old: bool) -> Endpoint:
        now = time.time()
        until = now + OLD_SECRET_S if keep_old else None
        return await self._do(lambda store: store.rotate(endpoint_id, secret, now, until))

    async def test(self, endpoint_id: str, event_type: EventType) -> int:
        """Sends a made-up event, once, and returns the status code of the answer. Raises UserError
        `webhook_unreachable`."""
        endpoint = await self.endpoint(endpoint_id)
        now = time.time()
        secrets = await self._do(lambda store: store.secrets(endpoint_id, now))
        notice = Notice(f"evt_test{uuid4().hex[:24]}", event_type, "ftjob-test", now)
        status_code, error = await self._post(Attempt(endpoint.id, endpoint.url, notice, 1, secrets))
        if status_code is None:
            raise UserError("webhook_unreachable", f"the endpoint can't be reached: {error}")
        return status_code

    async def deliveries(self, endpoint_id: str, limit: int, after: str | None) -> tuple[list[Delivery], bool]:
        return await self._do(lambda store: store.deliveries(endpoint_id, limit, after))

    async def redeliver(self, endpoint_id: str, event_id: str) -> Delivery:
        delivery = await self._do(lambda store: store.redeliver(endpoint_id, event_id, time.time()))
        self._due.set()
        return delivery

    # --- following the log

    async def run(self) -> None:
        """Runs both loops until it is cancelled, whatever fails."""
        await asyncio.gather(self._for_ever(self._follow), self._for_ever(self._send))

    async def _for_ever(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await work()
            except (LogUnavailable, WebhooksUnavailable) as error:
                logger.error("webhooks are not sent for now: %s", error)  # noqa: TRY400  -- where it was raised tells nothing
                await asyncio.sleep(_AFTER_FAILURE_S)
            except Exception:
                logger.exception("sending webhooks failed; trying again in %s s", _AFTER_FAILURE_S)
                await asyncio.sleep(_AFTER_FAILURE_S)

    async def _follow(self) -> None:
        """Follows the log while there are endpoints. Without endpoints the log is not read."""
        self._created.clear()
        if not await self._do(WebhookStore.has_endpoints):
            await self._created.wait()
            return
        position = kept = await self._position()
        while await self._do(WebhookStore.has_endpoints):
            page = await self._log.subscribe(position, _PAGE, _LOG_WAIT_S)
            if not page:
                continue
            position = page[-1].position
            notices = [_notice(recorded) for recorded in page if type(recorded.event) in EVENT_TYPES]
            if notices or position - kept > _CURSOR_LAG:
                cursor = Cursor(position, page[-1].event_id)
                await self._do(lambda store: store.note(notices, cursor, time.time()))  # noqa: B023  -- awaited in this round
                kept = position
                self._due.set()
            if len(page) < _PAGE:
                await asyncio.sleep(_BETWEEN_READS_S)

    async def _position(self) -> int:
        """The position to go on from. If the log is not the one that was followed (a backup was restored), that is
        before the oldest event that is not too old to be listed. Events that have a delivery already get no second one,
        because their ids are the same."""
        cursor = await self._do(WebhookStore.cursor)
        if cursor == await self._cursor_at(cursor.position):
            return cursor.position
        logger.warning("the event log is not the one that was followed, up to %d; it is read again", cursor.position)
        oldest = datetime.fromtimestamp(time.time() - self._pace.kept_s, UTC)
        position = 0
        while (page := await self._log.subscribe(position, _PAGE)) and page[-1].time < oldest:
            position = page[-1].position
        return position

    async def _cursor_at(self, position: int) -> Cursor:
        page = await self._log.subscribe(position - 1, 1) if position else []
        return Cursor(position, page[0].event_id if page else "")

    # --- sending

    async def _send(self) -> None:
        while True:
            self._due.clear()
            now = time.time()
            if now < self._looked - self._pace.timeout_s:  # if set back by less, attempts in flight would be due again
                await self._do(lambda store: store.clock_was_set_back(now))  # noqa: B023  -- awaited in this round
            self._looked = now
            if now - self._pruned > _PRUNE_EVERY_S:
                await self._do(lambda store: store.prune(now - self._pace.kept_s))  # noqa: B023  -- awaited in this round
                self._pruned = now
            attempts, due = await self._do(
                lambda store: store.claim(now, self._in_flight, self._pace.in_flight, self._hold_s)  # noqa: B023  -- same
            )
            for attempt in attempts:
                self._in_flight[attempt.endpoint_id] += 1
                task = asyncio.create_task(self._attempt(attempt))
                self._attempts.add(task)
                task.add_done_callback(self._attempts.discard)
            until_due = _LOOK_AGAIN_S if due is None else min(max(due - time.time(), 0), _LOOK_AGAIN_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(until_due):
                    await self._due.wait()

    def _hold_s(self, attempts: int) -> float:
        """When an attempt is due again if its outcome is never recorded, in seconds from its beginning."""
        return self._pace.timeout_s + self._pace.pause_s(attempts)

    async def _attempt(self, attempt: Attempt) -> None:
        try:
            status_code, error = await self._post(attempt)
            outcome = self._outcome(attempt, status_code, error)
            await self._do(lambda store: store.settle(attempt, outcome))
        except Exception:
            logger.exception("attempt %d for %s came to nothing", attempt.attempts, attempt.endpoint_id)
        finally:
            self._in_flight[attempt.endpoint_id] -= 1
            self._due.set()

    def _outcome(self, attempt: Attempt, status_code: int | None, error: str | None) -> Outcome:
        if error is None:
            return Outcome("delivered", status_code, None, None)
        if status_code == GONE:
            return Outcome("failed", status_code, error, None, disable=True)
        if attempt.attempts >= self._pace.attempts:
            return Outcome("failed", status_code, error, None)
        return Outcome("pending", status_code, error, time.time() + self._pace.pause_s(attempt.attempts))

    async def _post(self, attempt: Attempt) -> tuple[int | None, str | None]:
        """Makes one attempt. Returns the status code (None: no answer) and the error (None: a 2xx). Follows no redirect
        and doesn't read the body of the answer."""
        try:
            async with asyncio.timeout(self._pace.timeout_s):
                status_code = await self._answer(attempt)
        except TargetRefused as refused:
            return None, f"nothing was sent: {refused}"
        except (httpx.TimeoutException, TimeoutError):
            return None, f"no answer within {self._pace.timeout_s:g} s"
        except httpx.ConnectError as error:
            return None, f"no connection: {error}"
        except httpx.HTTPError as error:
            return None, f"the connection broke off: {type(error).__name__}"
        return status_code, None if 200 <= status_code < 300 else f"answered {status_code}"

    async def _answer(self, attempt: Attempt) -> int:
        url = parse(attempt.url)
        *others, last = await addresses_of(url, self._allowed, self._resolve)
        for address in others:
            with suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await self._answer_from(address, url, attempt)
        return await self._answer_from(last, url, attempt)

    async def _answer_from(self, address: str, url: httpx.URL, attempt: Attempt) -> int:
        """Sends to this address, which was checked, whatever the name may resolve to by now. The host's name is in the
        Host header and in TLS."""
        now, notice = datetime.now(UTC), attempt.notice
        signatures = [Webhook(secret).sign(notice.event_id, now, notice.body) for secret in attempt.secrets]
        request = httpx.Request(
            "POST",
            url.copy_with(host=address),
            headers={
                "Host": url.netloc.decode("ascii"),
                "User-Agent": "Tunewright",
                "Content-Type": "application/json",
                "webhook-id": notice.event_id,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": " ".join(signatures),
            },
            content=notice.body,
            extensions={
                "sni_hostname": url.raw_host.decode("ascii"),
                "timeout": httpx.Timeout(self._pace.timeout_s, connect=self._pace.timeout_s / 3).as_dict(),
            },
        )
        response = await self._transport.handle_async_request(request)
        await response.aclose()
        return response.status_code

    @cached_property
    def _transport(self) -> httpx.AsyncHTTPTransport:
        """Without a proxy, whose connections can't be checked, and without reusing connections: the next request to the
        same address may be for another host."""
        return httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))

    # ---

    async def _check(self, url: str) -> None:
        """Raises UserError `webhook_url_refused`."""
        try:
            async with asyncio.timeout(self._pace.timeout_s):
                await addresses_of(parse(url), self._allowed, self._resolve)
        except TargetRefused as refused:
            raise UserError("webhook_url_refused", str(refused), "url") from None
        except TimeoutError:
            raise UserError("webhook_url_refused", "its host can't be resolved in time", "url") from None

    async def _do(self, call: Callable[[WebhookStore], T]) -> T:
        """Calls the store, in its thread. After a failure the next call opens it again."""

        def in_thread() -> T:
            try:
                if self._store is None:
                    self._store = WebhookStore(self._path)
                return call(self._store)
            except (sqlite3.Error, OSError) as error:
                if self._store is not None:
                    self._store.close()
                    self._store = None
                raise WebhooksUnavailable(f"{self._path}: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, in_thread)

    async def close(self) -> None:
        """To be called after `run` was cancelled. Attempts in flight are cancelled, and due again after the next
        start."""
        for task in self._attempts:
            task.cancel()
        await asyncio.gather(*self._attempts, return_exceptions=True)
        if "_transport" in vars(self):
            await self._transport.aclose()
        if self._store is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._store.close)
        self._thread.shutdown()
        self._resolver.close()


def _notice(recorded: Recorded) -> Notice:
    """The notice of an event of the log. Its id is made of that event's id, so it stays the same even if the file of
    deliveries is lost."""
    event_id = f"evt_{hashlib.sha256(recorded.event_id.encode()).hexdigest()[:32]}"
    return Notice(event_id, EVENT_TYPES[type(recorded.event)], recorded.job_id, recorded.time.timestamp())

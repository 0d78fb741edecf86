"""Tells the event log which answers to submits were delivered, so that it can tell a retry from a second request.

A client that loses the connection before it has its answer sends the request again. An Idempotency-Key identifies such
a retry. Without one, the log returns the same job to an identical request for a minute, until it is told here that the
answer was delivered. See docs/decisions/0012-exactly-once-submit.md.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from events.log import LogUnavailable

LONGEST_WAIT_S = 5.0
"""How long a submit waits for the answer to an identical one, whose client may read slowly."""


def digest_of(request: Request, document: dict[str, Any]) -> str:
    """A hash of the request and its caller: identical requests of one caller have the same. The caller is identified by
    the Authorization header, else by X-Forwarded-For, else by the address."""
    address = request.client.host if request.client else ""
    caller = request.headers.get("authorization") or request.headers.get("x-forwarded-for") or address
    return hashlib.sha256(json.dumps([caller, document], sort_keys=True).encode()).hexdigest()


def says_it_is_a_retry(request: Request) -> bool:
    """OpenAI's and Anthropic's clients count their tries in this header."""
    count = request.headers.get("x-stainless-retry-count", "")
    return count.isascii() and count.isdigit() and int(count[:9]) > 0


class Deliveries:
    """The answers that this replica is sending."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Event] = {}

    async def settled(self, digest: str) -> None:
        """Waits while an answer to an identical request is being sent, until the log knows whether it was delivered. A
        client that has just received its answer may send the next request before that."""
        if (event := self._under_way.get(digest)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LONGEST_WAIT_S):
                    await event.wait()

    def answer(self, content: dict[str, Any], digest: str, delivered: Callable[[], Awaitable[None]]) -> JSONResponse:
        """A response that calls `delivered` once all of it was sent over a connection that was still open."""
        return _Answer(content, self, digest, delivered)

    def begin(self, digest: str) -> asyncio.Event:
        event = self._under_way[digest] = asyncio.Event()
        return event

    def end(self, digest: str, event: asyncio.Event) -> None:
        event.set()
        if self._under_way.get(digest) is event:
            del self._under_way[digest]


class _Answer(JSONResponse):
    def __init__(
        self, content: dict[str, Any], deliveries: Deliveries, digest: str, delivered: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(content)
        self._deliveries = deliveries
        self._digest = digest
        self._delivered = delivered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        event = self._deliveries.begin(self._digest)
        try:
            # Checked before sending: servers silently drop what they can't send, and report an answered request as
            # disconnected.
            gone = await Request(scope, receive).is_disconnected()
            await super().__call__(scope, receive, send)
            if not gone:
                with suppress(LogUnavailable):  # an identical request then gets the same job, which is safe
                    await self._delivered()
        finally:
            self._deliveries.end(self._digest, event)

"""Who has had the answer to a submit: what tells a request that is sent again from a second one that is the same.

A client that loses the connection before it has its answer sends the request again. With an Idempotency-Key that is
plain; without one, the log returns the same job to an identical request for a minute, until it is told here that the
answer was delivered. docs/decisions/0012-exactly-once-submit.md has the whole of it.
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
"""For an answer that is on its way to a client that reads slowly."""


def digest_of(request: Request, document: dict[str, Any]) -> str:
    """What an identical request of the same caller has in common with this one. The caller is whom it authenticates
    as, or else the address it comes from."""
    address = request.client.host if request.client else ""
    caller = request.headers.get("authorization") or request.headers.get("x-forwarded-for") or address
    return hashlib.sha256(json.dumps([caller, document], sort_keys=True).encode()).hexdigest()


def says_it_is_a_retry(request: Request) -> bool:
    """OpenAI's and Anthropic's clients count their tries in this header."""
    count = request.headers.get("x-stainless-retry-count", "")
    return count.isascii() and count.isdigit() and int(count[:9]) > 0


class Deliveries:
    """The answers of this replica that are under way."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Event] = {}

    async def settled(self, digest: str) -> None:
        """Returns once the log has heard what became of the answer to an identical request. A client that has just got
        its answer may send the next request before that."""
        if (event := self._under_way.get(digest)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LONGEST_WAIT_S):
                    await event.wait()

    def answer(self, content: dict[str, Any], digest: str, delivered: Callable[[], Awaitable[None]]) -> JSONResponse:
        """A response that calls `delivered` when all of it was sent to a client that was still there."""
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
            # To be asked before: servers drop what they can't send without a word, and call a request that was
            # answered disconnected.
            gone = await Request(scope, receive).is_disconnected()
            await super().__call__(scope, receive, send)
            if not gone:
                with suppress(LogUnavailable):  # then an identical request gets the same job: the safe side
                    await self._delivered()
        finally:
            self._deliveries.end(self._digest, event)

"""Caches an actor's answer for a short time, so that requests need not wait for it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from ray.exceptions import RayError

from events.log import LogUnavailable

T = TypeVar("T")

FIRST_ANSWER_S = 10.0
"""Time-out for the first answer: a dispatcher that starts or restarts answers within seconds."""
NEXT_ANSWER_S = 0.5
"""Time-out for later answers, when there is an earlier one to fall back on."""


class Recent(Generic[T]):
    """The last answer of `ask`: one call serves many requests.

    If the answer is older than `fresh_s`, `get` still returns it at once, but calls `ask` again in the background. If
    it is older than `stale_s`, `get` waits for the new one. If `ask` fails, the last answer stays; if there is none,
    LogUnavailable is raised.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], fresh_s: float, stale_s: float) -> None:
        self._ask = ask
        self._fresh_s, self._stale_s = fresh_s, stale_s
        self._answer: T | None = None
        self._asked = float("-inf")
        self._renewal: asyncio.Task[None] | None = None

    async def get(self) -> T:
        age = time.monotonic() - self._asked
        if age > self._fresh_s and self._renewal is None:
            self._renewal = asyncio.create_task(self._renew())
        if self._renewal is not None and (self._answer is None or age > self._stale_s):
            await asyncio.shield(self._renewal)  # others may wait for it too
        assert self._answer is not None  # noqa: S101  -- _renew has raised otherwise
        return self._answer

    async def _renew(self) -> None:
        try:
            async with asyncio.timeout(FIRST_ANSWER_S if self._answer is None else NEXT_ANSWER_S):
                self._answer = await self._ask()
        except (RayError, TimeoutError) as error:
            if self._answer is None:
                raise LogUnavailable(f"the dispatcher does not answer: {error}") from error
        finally:
            self._renewal = None
        self._asked = time.monotonic()

"""Waits for conditions by polling, and fails with a reason after a time limit."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

WAIT_S = 120.0
"""Time limit for what takes seconds on an idle machine."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.02, 0.25  # polling takes CPU time from what is waited for


def eventually(condition: Callable[[], T | None], timeout_s: float, complaint: Callable[[], str]) -> T:
    """Returns the condition's value as soon as it is true. Fails with `complaint()` after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    pause = _FIRST_PAUSE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, complaint()
        time.sleep(pause)
        pause = min(1.2 * pause, _LAST_PAUSE_S)
    return value


@overload
async def async_eventually(
    condition: Callable[[], Awaitable[T | None]], timeout_s: float, complaint: Callable[[], str]
) -> T: ...
@overload
async def async_eventually(condition: Callable[[], T | None], timeout_s: float, complaint: Callable[[], str]) -> T: ...
async def async_eventually(
    condition: Callable[[], Awaitable[T | None] | T | None], timeout_s: float, complaint: Callable[[], str]
) -> T:
    """As `eventually`, without blocking the event loop. The condition may be a coroutine function."""
    deadline = time.monotonic() + timeout_s
    pause = _FIRST_PAUSE_S
    while True:
        found = condition()
        value = await found if isinstance(found, Awaitable) else found
        if value:
            return value
        assert time.monotonic() < deadline, complaint()
        await asyncio.sleep(pause)
        pause = min(1.2 * pause, _LAST_PAUSE_S)

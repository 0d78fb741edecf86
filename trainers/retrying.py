"""Retries calls while the event log or the log queue restarts."""

import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from events.actors import blocking
from events.log import LogUnavailable

T = TypeVar("T")

GIVE_UP_AFTER_S = 120.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0


def retrying(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of the coroutine that `call` makes; this thread blocks. Repeats the call while it raises
    LogUnavailable, for up to `GIVE_UP_AFTER_S`; then raises that.

    The actors restart within seconds. `call` must be safe to repeat: appends carry event ids or sequence numbers.
    """
    deadline = time.monotonic() + GIVE_UP_AFTER_S
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return blocking(call())
        except LogUnavailable:
            if time.monotonic() + pause_s > deadline:
                raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

"""Lets coroutines wait for news about a key."""

import asyncio
from collections.abc import Hashable


class Bell:
    """`heard` waits, and `ring` wakes every coroutine that waits on the key now. Keys without waiters take no memory.

    For use within one event loop. There must be no await between reading the state and calling `heard`, or a ring in
    between is missed.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, set[asyncio.Future[None]]] = {}

    async def heard(self, key: Hashable, timeout_s: float) -> bool:
        """True when rung within the time."""
        waiting = self._waiting.setdefault(key, set())
        rung: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.add(rung)
        try:
            async with asyncio.timeout(timeout_s):
                await rung
        except TimeoutError:
            return False
        finally:
            waiting.discard(rung)
            if not waiting and self._waiting.get(key) is waiting:
                del self._waiting[key]
        return True

    def ring(self, key: Hashable) -> None:
        for rung in self._waiting.pop(key, ()):
            if not rung.done():
                rung.set_result(None)

"""Waiting for news about a key, and waking the waiters."""

import asyncio
from collections.abc import Awaitable, Callable

from events.bell import Bell


def with_bell(scenario: Callable[[Bell], Awaitable[None]]) -> None:
    async def run() -> None:
        bell = Bell()
        await scenario(bell)
        assert bell._waiting == {}  # nothing is left behind

    asyncio.run(run())


def test_a_ring_wakes_everyone_who_waits_on_that_key_and_nobody_else() -> None:
    async def scenario(bell: Bell) -> None:
        mine = [asyncio.create_task(bell.heard("a", 10)) for _ in range(3)]
        other = asyncio.create_task(bell.heard("b", 0.05))
        await asyncio.sleep(0)
        bell.ring("a")
        assert await asyncio.gather(*mine) == [True] * 3
        assert await other is False

    with_bell(scenario)


def test_a_ring_before_the_wait_is_not_heard() -> None:
    async def scenario(bell: Bell) -> None:
        bell.ring("a")
        assert await bell.heard("a", 0.01) is False

    with_bell(scenario)


def test_one_who_gives_up_does_not_take_the_others_along() -> None:
    async def scenario(bell: Bell) -> None:
        stays, goes = (asyncio.create_task(bell.heard("a", 10)) for _ in range(2))
        await asyncio.sleep(0)
        goes.cancel()
        await asyncio.sleep(0)
        bell.ring("a")
        assert await stays is True

    with_bell(scenario)


def test_who_waits_again_is_heard_again() -> None:
    async def scenario(bell: Bell) -> None:
        for _ in range(3):
            waiting = asyncio.create_task(bell.heard("a", 10))
            await asyncio.sleep(0)
            bell.ring("a")
            assert await waiting is True

    with_bell(scenario)

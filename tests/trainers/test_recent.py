"""The cached answer of an actor: which requests wait for the next one, and which don't."""

import asyncio

import pytest
from ray.exceptions import RayError

from events.log import LogUnavailable
from tests.waiting import WAIT_S, async_eventually
from trainers.recent import Recent


class Oracle:
    """Counts. Answers once it may, or raises."""

    def __init__(self) -> None:
        self.asked = 0
        self.may = asyncio.Event()
        self.failing = False

    async def ask(self) -> int:
        self.asked += 1
        await self.may.wait()
        if self.failing:
            raise RayError("gone")
        return self.asked


def test_all_wait_for_the_first_answer_which_is_asked_for_once() -> None:
    async def scenario() -> None:
        oracle = Oracle()
        recent = Recent(oracle.ask, fresh_s=60, stale_s=60)
        waiting = [asyncio.create_task(recent.get()) for _ in range(5)]
        await async_eventually(lambda: oracle.asked, WAIT_S, lambda: "nobody asks")
        oracle.may.set()
        assert await asyncio.gather(*waiting) == [1] * 5
        assert await recent.get() == 1
        assert oracle.asked == 1

    asyncio.run(scenario())


def test_an_answer_that_is_not_fresh_is_given_at_once_and_renewed() -> None:
    async def scenario() -> None:
        oracle = Oracle()
        oracle.may.set()
        recent = Recent(oracle.ask, fresh_s=0, stale_s=60)
        assert await recent.get() == 1
        oracle.may.clear()
        assert [await recent.get() for _ in range(3)] == [1] * 3  # nobody lets it answer
        oracle.may.set()

        async def renewed() -> bool:
            return await recent.get() > 1

        await async_eventually(renewed, WAIT_S, lambda: "the answer stays")

    asyncio.run(scenario())


def test_an_answer_that_is_too_old_is_replaced_before_it_is_given() -> None:
    async def scenario() -> None:
        oracle = Oracle()
        oracle.may.set()
        recent = Recent(oracle.ask, fresh_s=0, stale_s=0)
        assert [await recent.get() for _ in range(3)] == [1, 2, 3]

    asyncio.run(scenario())


def test_the_last_answer_stays_while_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.recent.NEXT_ANSWER_S", 0.05)

    async def scenario() -> None:
        oracle = Oracle()
        oracle.may.set()
        recent = Recent(oracle.ask, fresh_s=0, stale_s=0)
        assert await recent.get() == 1
        oracle.failing = True
        assert await recent.get() == 1
        oracle.may.clear()
        assert await recent.get() == 1
        oracle.failing = False
        oracle.may.set()
        assert await recent.get() == 4

    asyncio.run(scenario())


def test_without_any_answer_the_service_is_unavailable() -> None:
    async def scenario() -> None:
        oracle = Oracle()
        oracle.failing = True
        oracle.may.set()
        recent = Recent(oracle.ask, fresh_s=1, stale_s=1)
        for _ in range(2):
            with pytest.raises(LogUnavailable, match="gone"):
                await recent.get()
        oracle.failing = False
        assert await recent.get() == 3

    asyncio.run(scenario())

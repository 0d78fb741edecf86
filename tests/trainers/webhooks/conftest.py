"""Scenarios of webhooks, on a real event log."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from events.log import EventLog
from tests.trainers.webhooks.support import log_in

Scenario = Callable[[EventLog], Coroutine[Any, Any, None]]
Play = Callable[[Scenario], None]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Runs a scenario with the log of this test's directory."""

    def play(scenario: Scenario) -> None:
        async def with_log() -> None:
            log = log_in(tmp_path)
            try:
                await scenario(log)
            finally:
                await log.close()

        asyncio.run(with_log())

    return play

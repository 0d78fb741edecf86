"""Sizes of result files."""

import asyncio
from pathlib import Path

from events.facts import JobSucceeded
from events.memory import MemoryStore
from serve_app.openai.results import Sizes, result_csv
from tests.events.facts_of_a_job import ADMITTED, VALIDATED, measured, started, step
from tests.events.support import append, opened, submit


def test_a_job_that_ends_again_after_a_backup_was_restored_has_a_new_size(tmp_path: Path) -> None:
    """With other metrics, and as many events as before."""

    async def scenario() -> None:
        for loss in (2.0, 2.125):
            async with opened(MemoryStore()) as log:
                await submit(log, "a")
                await append(log, "a", VALIDATED, ADMITTED, started(1), measured(1, step(1, loss=loss)), JobSucceeded())
                job = await log.job("a")
                assert await Sizes(tmp_path / "sizes").of(log, job) == len(await result_csv(log, job))

    asyncio.run(scenario())

"""Helpers of the webhooks tests: jobs that end, a running deliverer, and waiting for its deliveries."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from events.actors import AnyLog
from events.facts import Event
from events.ids import new_event_id
from events.log import EventLog
from events.sqlite import SqliteStore
from tests.events.facts_of_a_job import BEGUN, CANCEL, CANCELLED, FAILED, REJECTED, SUBMITTED, SUCCEEDED
from tests.waiting import WAIT_S, async_eventually
from trainers.settings import Settings
from trainers.webhooks.deliverer import Pace, Webhooks
from trainers.webhooks.store import Delivery, Endpoint, EventType, new_endpoint_id, new_secret
from trainers.webhooks.targets import Resolve

ENDS: dict[str, list[Event]] = {
    "succeeded": [*BEGUN, SUCCEEDED],
    "failed": [*BEGUN, FAILED],
    "rejected": [REJECTED],
    "cancelled": [CANCEL, CANCELLED],
}
TYPES: list[EventType] = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
FAST = Pace(first_pause_s=0.02, growth=1.5, longest_pause_s=0.3)
IMPATIENT = replace(FAST, timeout_s=0.5)
"""For receivers that hang. On a busy machine others, too, may take longer than that."""
SLOW = Pace(first_pause_s=3600, timeout_s=60)


def settings_in(directory: Path, networks: str = "127.0.0.0/8") -> Settings:
    return Settings(storage=directory, webhook_networks=networks)


def log_in(directory: Path) -> EventLog:
    return EventLog(SqliteStore(directory / "events.db"))


async def end_job(log: Any, job_id: str, how: str = "succeeded") -> None:
    """Records all of a job, from its submit to its end."""
    await log.submit(job_id, SUBMITTED, new_event_id(), 1_000_000)
    await log.append(job_id, ENDS[how], [new_event_id() for _ in ENDS[how]])


@asynccontextmanager
async def delivering(
    log: AnyLog, settings: Settings, pace: Pace = FAST, resolve: Resolve | None = None
) -> AsyncIterator[Webhooks]:
    webhooks = Webhooks(log, settings, pace, resolve)
    running = asyncio.create_task(webhooks.run())
    try:
        yield webhooks
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await webhooks.close()


class Made(NamedTuple):
    endpoint: Endpoint
    secret: str


async def endpoint(webhooks: Webhooks, url: str, *types: EventType) -> Made:
    secret = new_secret()
    return Made(await webhooks.create(new_endpoint_id(), secret, "test", url, list(types) or TYPES), secret)


async def all_deliveries(webhooks: Webhooks, endpoint_id: str) -> list[Delivery]:
    found, more = await webhooks.deliveries(endpoint_id, 100, None)
    while more:
        older, more = await webhooks.deliveries(endpoint_id, 100, found[-1].notice.event_id)
        found += older
    return found


async def until_settled(webhooks: Webhooks, endpoint_id: str, status: str, count: int = 1) -> list[Delivery]:
    """All of the endpoint's deliveries, once there are `count`, each with that status."""
    found: list[Delivery] = []

    async def settled() -> bool:
        found[:] = await all_deliveries(webhooks, endpoint_id)
        return len(found) == count and {one.status for one in found} == {status}

    await async_eventually(settled, WAIT_S, lambda: f"the deliveries stay {found}")
    return found

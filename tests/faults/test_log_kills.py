"""Kills the log's process again and again while many clients write to it."""

import asyncio
import os
import random
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from events import sqlite
from events.facts import MetricsRecorded
from events.store import ExpectedVersionError
from tests.events.facts_of_a_job import BEGUN, SUBMITTED, measured, step
from tests.events.support import history_of
from tests.faults.immortal import kept_alive
from tests.faults.log_server import STRIDE, Client
from tests.waiting import async_eventually

WRITERS = 64
CLIENTS, JOBS = 20, 3


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a short path: the path of a Unix socket may have about a hundred characters."""
    monkeypatch.setattr(sqlite, "_STRIDE", STRIDE)
    with tempfile.TemporaryDirectory(prefix="tw-", dir="/tmp") as directory:
        yield Path(directory)


async def start_job(client: Client, job_id: str) -> None:
    await client.call("submit", job_id, SUBMITTED, f"{job_id}:s", 1000)
    await client.call("append", job_id, list(BEGUN), [f"{job_id}:{fact}" for fact in "var"])


async def kill(client: Client, chance: random.Random, pause_s: float) -> None:
    """Kills the server once it is up, after a pause of up to `pause_s`."""
    client.close()
    client._connection = None
    await client.call("jobs", 1)
    await asyncio.sleep(chance.uniform(0, pause_s))
    os.kill(client.pid, signal.SIGKILL)


def test_kills_lose_nothing_double_nothing_and_leave_no_gap(directory: Path, seed: int, long: bool) -> None:
    """64 writers, each with a job of its own, send their next event when the one before is acknowledged."""
    kills, events = (1000, 500_000) if long else (15, 3_000)
    chance = random.Random(seed)  # noqa: S311  -- no secret

    async def write(number: int, acknowledged: list[str], enough: asyncio.Event) -> int:
        client = Client(directory)
        job_id = f"job-{number}"
        await start_job(client, job_id)
        while not enough.is_set():
            event_id = f"{job_id}:{len(acknowledged)}"
            await client.call("append", job_id, [measured(1, step(len(acknowledged)))], [event_id])
            acknowledged.append(event_id)
        client.close()
        return client.retries

    async def scenario() -> tuple[list[list[str]], int]:
        enough = asyncio.Event()
        acknowledged: list[list[str]] = [[] for _ in range(WRITERS)]
        writers = [asyncio.create_task(write(number, ids, enough)) for number, ids in enumerate(acknowledged)]
        killer = Client(directory)
        for _ in range(kills):
            await kill(killer, chance, 0.3)
        await async_eventually(
            lambda: sum(map(len, acknowledged)) >= events,
            3600,
            lambda: f"too few events: {sum(map(len, acknowledged))}",
        )
        enough.set()
        return acknowledged, sum(await asyncio.gather(*writers))

    began = time.monotonic()
    with kept_alive("tests.faults.log_server", directory):
        acknowledged, retries = asyncio.run(scenario())
    assert retries >= kills
    of_job: defaultdict[str, list[str]] = defaultdict(list)
    for one in history_of(directory):
        if isinstance(one.event, MetricsRecorded):
            of_job[one.job_id].append(one.event_id)
    assert [of_job[f"job-{number}"] for number in range(WRITERS)] == acknowledged
    total = sum(map(len, acknowledged))
    print(f"{kills} kills, {total} events acknowledged, {retries} retries, {time.monotonic() - began:.0f} s")  # noqa: T201


class Done(NamedTuple):
    """An operation of a client: when it was sent and answered, the event that it appended, the version that it saw."""

    asked: float
    answered: float
    job_id: str
    event_id: str | None
    seen: int


def test_what_concurrent_clients_see_of_a_job_happened_in_one_order(directory: Path, seed: int, long: bool) -> None:
    """20 clients read, append, and append on condition that the job hasn't changed, while the server is killed.

    Versions number the appends of a job, so they give the only possible order. An operation that was answered before
    another was sent must not come after it: nothing else can contradict linearizability.
    """
    operations, kills = (500, 60) if long else (25, 3)

    async def act(number: int) -> list[Done]:
        chance, client, done = random.Random(seed + number), Client(directory), []  # noqa: S311  -- no secret
        last_seen = dict.fromkeys(range(JOBS), 3)
        for count in range(operations):
            job = chance.randrange(JOBS)
            job_id, event_id, expected = f"job-{job}", f"{number}:{count}", None
            what = chance.choice(["read", "append", "append if unchanged"])
            if what == "append if unchanged":
                expected = last_seen[job]
            asked = time.monotonic()
            appended = None
            try:
                if what == "read":
                    seen = (await client.call("job", job_id)).version
                else:
                    event = measured(1, step(count))
                    seen = (await client.call("append", job_id, [event], [event_id], expected)).version
                    appended = event_id
            except ExpectedVersionError as error:
                seen = error.actual
                assert seen != expected
            last_seen[job] = seen
            done.append(Done(asked, time.monotonic(), job_id, appended, seen))
        client.close()
        return done

    async def scenario() -> list[Done]:
        for job in range(JOBS):
            await start_job(Client(directory), f"job-{job}")
        clients = [asyncio.create_task(act(number)) for number in range(CLIENTS)]
        chance, killer = random.Random(seed), Client(directory)  # noqa: S311  -- no secret
        for _ in range(kills):
            await kill(killer, chance, 0.3)
        return [one for done in await asyncio.gather(*clients) for one in done]

    with kept_alive("tests.faults.log_server", directory):
        done = asyncio.run(scenario())
    version = {one.event_id: one.version for one in history_of(directory)}
    assert {one.event_id for one in done if one.event_id} == {event_id for event_id in version if event_id[0].isdigit()}
    for job in range(JOBS):
        contradictions = list(out_of_order([one for one in done if one.job_id == f"job-{job}"], version))
        assert contradictions == []


def out_of_order(done: list[Done], version: dict[str, int]) -> Iterator[tuple[Done, Done]]:
    """Pairs of which the first was answered before the second was sent, but comes after it. An append comes at its
    version; a read comes after the version that it saw and before the next."""
    for first in done:
        at = first.seen if first.event_id is None else max(version[first.event_id], first.seen)
        for second in done:
            if first.answered < second.asked:
                after = second.seen < at if second.event_id is None else version[second.event_id] <= at
                if after:
                    yield first, second


def test_the_check_of_the_order_knows_a_stale_read() -> None:
    write, read = Done(0, 1, "a", "w", 1), Done(2, 3, "a", None, 0)
    assert list(out_of_order([write, read], {"w": 1})) == [(write, read)]
    assert list(out_of_order([write, read._replace(seen=1)], {"w": 1})) == []

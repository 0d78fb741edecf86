"""Kills the process that sends webhooks again and again, and sometimes the log that it follows."""

import asyncio
import os
import random
import signal
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from tests.events.facts_of_a_job import REJECTED, SUBMITTED
from tests.faults.immortal import kept_alive
from tests.faults.log_server import Client
from tests.faults.webhook_sender import webhooks_in
from tests.trainers.webhooks.support import endpoint, until_settled
from tests.waiting import WAIT_S, async_eventually
from tests.webhook_receiver import Answer, Receiver, verified


def test_kills_lose_no_webhook_and_change_none(seed: int, long: bool) -> None:
    """Jobs end one after the other, the receiver fails three times in ten, and the sender is killed again and again."""
    kills, jobs = (200, 10_000) if long else (12, 400)
    chance = random.Random(seed)  # noqa: S311  -- no secret
    fails = random.Random(seed + 1)  # noqa: S311  -- in other threads

    failures: list[Answer] = [500, "drop", "hang"]

    def answer(_: int) -> Answer:
        return fails.choice(failures) if fails.random() < 0.3 else 200

    async def end_jobs(directory: Path) -> None:
        client = Client(directory)
        for number in range(jobs):
            job_id = f"ftjob-{number}"
            await client.call("submit", job_id, SUBMITTED, f"{job_id}:s", 1_000_000)
            await client.call("append", job_id, [REJECTED], [f"{job_id}:r"])
            await asyncio.sleep(0.005)
        client.close()

    async def kill(directory: Path) -> None:
        """Kills the sender, within a second after its start, and sometimes the log with it."""
        log = Client(directory)

        def next_sender() -> int:
            sender = int((directory / "pid").read_text()) if (directory / "pid").exists() else 0
            return 0 if sender in victims else sender

        for _ in range(kills):
            await log.call("jobs", 1)  # connects to the log's current process
            sender = await async_eventually(next_sender, WAIT_S, lambda: "no sender starts")
            await asyncio.sleep(chance.uniform(0, 1))
            victims.add(sender)
            os.kill(sender, signal.SIGKILL)
            if chance.random() < 0.2:
                os.kill(log.pid, signal.SIGKILL)
        log.close()

    async def scenario(directory: Path, receiver: Receiver) -> tuple[str, Counter[int]]:
        webhooks = webhooks_in(directory)
        created = await endpoint(webhooks, receiver.url)
        await webhooks.close()
        with kept_alive("tests.faults.webhook_sender", directory):
            await asyncio.gather(end_jobs(directory), kill(directory))
            await async_eventually(
                lambda: len({got.headers["webhook-id"] for got in receiver.delivered()}) == jobs,
                WAIT_S, lambda: "not all arrive",
            )  # fmt: skip
        webhooks = webhooks_in(directory)
        running = asyncio.create_task(webhooks.run())
        told = await until_settled(webhooks, created.endpoint.id, "delivered", jobs)
        running.cancel()
        await webhooks.close()
        return created.secret, Counter(delivery.attempts for delivery in told)

    victims: set[int] = set()
    with (
        tempfile.TemporaryDirectory(prefix="tw-", dir="/tmp") as name,
        Receiver(answer) as receiver,
        kept_alive("tests.faults.log_server", Path(name)),
    ):
        secret, attempts = asyncio.run(scenario(Path(name), receiver))
    assert len(victims) == kills
    said = defaultdict(set)
    for got in receiver.got:
        said[verified(got, secret).data.id].add((got.headers["webhook-id"], got.body))
    assert len(said) == jobs
    assert {len(of_one) for of_one in said.values()} == {1}
    assert max(attempts) > 2

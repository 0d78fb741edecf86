"""A process that sends webhooks. It may be killed at any moment and is back at once.

    python -m tests.faults.webhook_sender DIRECTORY

follows the event log that `tests.faults.log_server` serves in DIRECTORY, and writes its process id to DIRECTORY/pid.
"""

import os
from pathlib import Path
from typing import Any

from events.store import Recorded
from tests.faults.immortal import back_at_once
from tests.faults.log_server import Client
from trainers.settings import Settings
from trainers.webhooks.deliverer import Pace, Webhooks

PACE = Pace(first_pause_s=0.05, growth=1.5, longest_pause_s=0.5, timeout_s=0.5)


class Log:
    """The methods of an event log that webhooks need. They call the log server."""

    def __init__(self, directory: Path) -> None:
        self._client = Client(directory)

    async def subscribe(self, after_position: int, limit: int = 1000, wait_s: float = 0) -> list[Recorded]:
        page: list[Recorded] = await self._client.call("subscribe", after_position, limit, wait_s)
        return page

    async def live_jobs(self) -> Any:
        return await self._client.call("live_jobs")


def webhooks_in(directory: Path) -> Webhooks:
    log: Any = Log(directory)
    return Webhooks(log, Settings(storage=directory, webhook_networks="127.0.0.0/8"), PACE)


async def _send(directory: Path) -> None:
    webhooks = webhooks_in(directory)
    (directory / "pid.new").write_text(str(os.getpid()))
    (directory / "pid.new").rename(directory / "pid")
    await webhooks.run()


if __name__ == "__main__":
    back_at_once(_send)

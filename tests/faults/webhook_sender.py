"""A process that sends webhooks, that may be killed at any moment and is back at once.

    python -m tests.faults.webhook_sender DIRECTORY

follows the event log that `tests.faults.log_server` serves in DIRECTORY, and writes its process id to DIRECTORY/pid. It
is itself only the parent that forks the next sender whenever one dies, until its standard input ends.
"""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from events import Recorded
from tests.faults.log_server import Client
from trainers.settings import Settings
from trainers.webhooks.deliverer import Pace, Webhooks

PACE = Pace(first_pause_s=0.05, growth=1.5, longest_pause_s=0.5, timeout_s=0.5)


class Log:
    """The part of an event log that webhooks need, in the log server's process."""

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


def send(directory: Path) -> None:
    while True:
        if (child := os.fork()) == 0:
            asyncio.run(_send(directory))
            os._exit(0)
        ended = os.pidfd_open(child)
        ready, _, _ = select.select([ended, sys.stdin], [], [])
        if sys.stdin in ready:
            os.kill(child, signal.SIGKILL)
            return
        os.waitpid(child, 0)
        os.close(ended)


@contextmanager
def sending(directory: Path) -> Iterator[None]:
    """A sender runs, or is about to."""
    command = [sys.executable, "-m", "tests.faults.webhook_sender", str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        yield
        assert parent.stdin is not None
        parent.stdin.close()
        assert parent.wait(60) == 0


if __name__ == "__main__":
    send(Path(sys.argv[1]))

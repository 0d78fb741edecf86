"""Writes and syncs that fail are not acknowledged and lose nothing that was; once they work again, the log goes on."""

import asyncio
import random
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from events.log import EventLog, LogUnavailable
from events.sqlite import SqliteStore
from events.store import StoreFailedError
from tests.events.facts_of_a_job import SUBMITTED
from tests.events.support import full_disk, history_of, opened, submit
from tests.faults.disk import STRACE, needs_strace

FAILURES = [
    ("fsync,fdatasync", "EIO"),
    ("fsync,fdatasync", "ENOSPC"),
    ("pwrite64", "ENOSPC"),
    ("pwrite64", "EIO"),
    ("ftruncate", "EIO"),
]


@needs_strace
@pytest.mark.parametrize(("call", "error"), FAILURES)
def test_a_call_that_fails_is_not_acknowledged_and_loses_nothing(
    tmp_path: Path, call: str, error: str, seed: int, long: bool
) -> None:
    """strace replaces the results of one or several calls in a row, at a random time in the log's life."""
    chance = random.Random(f"{seed} {call} {error}")  # noqa: S311  -- no secret
    for number in range(100 if long else 1):
        directory = tmp_path / str(number)
        directory.mkdir()
        first, failures = (
            chance.randint(4, 9) if call == "ftruncate" else chance.randint(12, 40),
            chance.choice([1, 1, 2, 7]),
        )
        inject = f"inject={call}:error={error}:when={first}..{first + failures - 1}"
        trace = directory / "trace"
        strace = [STRACE, "-f", "-y", "-o", str(trace), "-e", f"trace={call}", "-e", inject]
        program = [sys.executable, "-m", "tests.faults.test_log_writes", str(directory / "events.db")]
        done = subprocess.run([*strace, *program], capture_output=True, text=True, check=False, timeout=250)
        assert done.returncode == 0, f"{inject}: {done.stderr}"
        said = [line.split() for line in done.stdout.splitlines()]
        injected = [line for line in trace.read_text().splitlines() if "INJECTED" in line]
        assert injected, f"{inject} hit nothing"
        noticed = [line for line in injected if "events.db.lock>" not in line]  # its position may be out of date
        assert any(what == "failed" for what, _ in said) == bool(noticed), f"{inject}: {injected}"
        acknowledged = [event_id for what, event_id in said if what == "acknowledged"]
        assert {one.event_id for one in history_of(directory)} == set(acknowledged)


def test_a_full_disk_refuses_appends_and_takes_them_once_there_is_room(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "events.db") as log:
            await submit(log, "before")
            with full_disk(tmp_path / "events.db.lock"):  # it has 32 bytes: no file can be written beyond that
                for number in range(5):
                    with pytest.raises(LogUnavailable):
                        await submit(log, f"during-{number}")
                    assert (await log.job("before")).status == "validation"  # reading goes on
            for number in range(5):
                await submit(log, f"during-{number}")
            await submit(log, "after")

    asyncio.run(scenario())
    assert [one.job_id for one in history_of(tmp_path)] == ["before", *(f"during-{n}" for n in range(5)), "after"]


def test_too_many_open_files_refuse_appends_and_take_them_later(tmp_path: Path) -> None:
    """The log opens files only at its start and after a failed write."""

    async def scenario() -> None:
        async with opened(tmp_path / "events.db") as log:
            await submit(log, "before")
            await asyncio.to_thread(int)  # starts a thread and opens the files that it needs, while that is possible
            with full_disk(tmp_path / "events.db-wal"), pytest.raises(LogUnavailable):
                await submit(log, "during")
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # files that are open stay open
            try:
                for _ in range(3):
                    with pytest.raises(LogUnavailable, match="unable to open"):
                        await submit(log, "during")
                    assert (await log.job("before")).status == "validation"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            await submit(log, "during")

    asyncio.run(scenario())
    assert [one.job_id for one in history_of(tmp_path)] == ["before", "during"]


async def _submit_sixty(file: Path) -> None:
    """Opens the log and submits sixty jobs. Tries each until it succeeds, and prints the outcome of every try."""
    while True:
        try:
            log = EventLog(SqliteStore(file))
            break
        except StoreFailedError:
            sys.stdout.write("failed opening\n")
    for number in range(60):
        for _ in range(100):
            with suppress(LogUnavailable):
                await log.submit(f"job-{number}", SUBMITTED, f"e{number}", 1000)
                sys.stdout.write(f"acknowledged e{number}\n")
                break
            sys.stdout.write(f"failed e{number}\n")
    await log.close()


if __name__ == "__main__":
    from events import sqlite

    sqlite._WAL_BYTES = 64 << 10  # otherwise the write-ahead log would never be emptied
    asyncio.run(_submit_sixty(Path(sys.argv[1])))

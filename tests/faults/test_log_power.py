"""Loss of power at any moment: acknowledged batches are kept, and any other is there whole or not at all."""

import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from events import sqlite
from events.facts import Event
from events.memory import MemoryStore
from events.sqlite import SqliteStore
from events.store import EventStore, Recorded
from tests.events.facts_of_a_job import ADMITTED, CANCEL, SUBMITTED, VALIDATED, measured, started, step
from tests.events.support import add, check_all
from tests.faults.disk import Disk, Said, Step, needs_strace, record

BATCHES = 24
SHORT_LOG = 64 << 10  # so that the write-ahead log is emptied every few batches, and many crashes happen meanwhile
STRIDE = 16  # of about two hundred events


def batch(number: int) -> list[tuple[str, str, Event]]:
    """One to twenty events of three jobs; some take many sectors."""
    chance = random.Random(number)  # noqa: S311  -- no secret
    if number == 0:
        facts: list[Event] = [SUBMITTED, VALIDATED, ADMITTED, started(1)]
        return [(job, f"{job}{n}", fact) for job in "abc" for n, fact in enumerate(facts)]
    many = chance.choice([1, 1, 5, 20])
    steps = [step(n) for n in range(chance.choice([1, 1, 40]))]
    return [(chance.choice("abc"), f"{number}:{n}", measured(1, *steps)) for n in range(many)]


def write(store: EventStore) -> Iterator[int]:
    """Writes all batches; yields the last position after each."""
    for number in range(BATCHES):
        yield add(store, batch(number))[-1].position


@needs_strace
def test_power_cuts_lose_nothing_that_was_acknowledged(
    memory: Path, seed: int, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_STRIDE", STRIDE)
    crashes = 10_000 if long else 150
    steps = recorded(memory)
    expected = MemoryStore()
    boundaries = [0, *write(expected)]
    history = expected.read_all(limit=100_000)
    chance = random.Random(seed)  # noqa: S311  -- no secret
    moments = sorted(chance.choices(range(len(steps) + 1), k=crashes))
    disk, played, acknowledged = Disk(), 0, 0
    for number, moment in enumerate(moments):
        while played < moment:
            disk.play(steps[played])
            if isinstance(said := steps[played], Said):
                acknowledged = int(said.text)
            played += 1
        left = memory / "left"
        left.mkdir()
        disk.crash(left, random.Random(seed + number))  # noqa: S311  -- no secret
        survives(left, acknowledged, boundaries, history)
        shutil.rmtree(left)
    assert acknowledged > 0


def recorded(memory: Path) -> list[Step]:
    (memory / "disk").mkdir()
    command = [sys.executable, "-m", "tests.faults.test_log_power", str(memory / "disk" / "events.db")]
    steps = record(command, memory / "disk", memory / "trace")
    assert sum(isinstance(one, Said) for one in steps) == BATCHES
    return steps


def survives(left: Path, acknowledged: int, boundaries: list[int], history: list[Recorded]) -> None:
    with closing(SqliteStore(left / "events.db")) as store:
        last = store.last_position()
        assert last >= acknowledged
        assert last in boundaries
        assert store.read_all(limit=100_000) == history[:last]
        for job in "abc":
            assert store.read_stream(job) == [one for one in history[:last] if one.job_id == job]
        assert check_all(store) == last
        assert store.damage == {}
        assert store.integrity() == []
        add(store, [("a", "after", CANCEL)])
        assert store.last_position() == last + 1


if __name__ == "__main__":
    sqlite._STRIDE = STRIDE
    sqlite._WAL_BYTES = SHORT_LOG
    for position in write(SqliteStore(Path(sys.argv[1]))):
        sys.stdout.write(f"{position}\n")
        sys.stdout.flush()

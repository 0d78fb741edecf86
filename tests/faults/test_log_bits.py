"""Every bit of a log of 100 events, flipped: found, or without any effect on what is read."""

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from events import Recorded, SqliteStore, sqlite
from events.facts import Event
from events.store import JobDamagedError, StoreFailedError
from tests.events.facts_of_a_job import ADMITTED, SUBMITTED, VALIDATED, measured, started, step
from tests.events.support import add

JOBS = "abcd"


@pytest.fixture(autouse=True)
def stride(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 64 events of the hundred are in `streams`."""
    monkeypatch.setattr(sqlite, "_STRIDE", 64)


def write(store: SqliteStore) -> None:
    """A hundred events of four jobs, five at a time."""
    facts: list[Event] = [SUBMITTED, VALIDATED, ADMITTED, started(1), *(measured(1, step(n)) for n in range(21))]
    new = [(job, f"{job}{n:02}", fact) for n, fact in enumerate(facts) for job in JOBS]
    for start in range(0, len(new), 5):
        add(store, new[start : start + 5])


def read(store: SqliteStore) -> tuple[list[Recorded], list[str]]:
    """The events that can be read, and all that a check says is wrong."""
    position = 0
    while (reached := store.check(position)) > position:
        position = reached
    history = store.read_all()
    problems = [damage.why for damage in store.damage.values()] + store.integrity()
    for job in JOBS:
        try:
            assert store.read_stream(job) == [one for one in history if one.job_id == job] or problems
        except JobDamagedError as error:
            problems.append(str(error))
    return history, problems


def outcome(directory: Path, written: list[Recorded]) -> str:
    try:
        with closing(SqliteStore(directory / "events.db")) as store:
            history, problems = read(store)
    except StoreFailedError:
        return "the log does not open"
    # Whatever is served was written; and nothing is missing without a word.
    assert all(one in written for one in history)
    if problems:
        return "reported"
    assert history == written
    return "no effect"


def chosen(bits: int, sample: int | None, seed: int) -> list[int]:
    return list(range(bits)) if sample is None else random.Random(seed).sample(range(bits), sample)  # noqa: S311  -- no secret


def test_a_flipped_bit_of_the_file_is_found_or_means_nothing(memory: Path, seed: int, long: bool) -> None:
    """What means nothing is room on a page that holds no event: the file may differ there, what is read does not."""
    with closing(SqliteStore(memory / "events.db")) as store:
        write(store)
        written, problems = read(store)
    assert (len(written), problems) == (100, [])
    whole = (memory / "events.db").read_bytes()
    seen = dict.fromkeys(["reported", "the log does not open", "no effect"], 0)
    for bit in chosen(len(whole) * 8, None if long else 250, seed):
        (memory / "events.db").write_bytes(flipped(whole, bit))
        seen[outcome(memory, written)] += 1
    print(seen)  # noqa: T201
    assert seen["reported"] > seen["the log does not open"]


def test_a_flipped_bit_of_the_write_ahead_log_is_found_or_means_nothing(memory: Path, seed: int, long: bool) -> None:
    """After a SIGKILL. SQLite alone would forget acknowledged events here, without a word."""
    alive = memory / "alive"
    alive.mkdir()
    with closing(SqliteStore(alive / "events.db")) as store:
        write(store)
        written, _ = read(store)
        shutil.copytree(alive, memory / "killed")  # as a process leaves it that does not get to close it
    wal = (memory / "killed" / "events.db-wal").read_bytes()
    assert len(wal) > 50_000
    seen = dict.fromkeys(["reported", "the log does not open", "no effect"], 0)
    for bit in chosen(len(wal) * 8, None if long else 150, seed):
        with tempfile.TemporaryDirectory(dir=memory) as directory:
            shutil.copytree(memory / "killed", directory, dirs_exist_ok=True)
            (Path(directory) / "events.db-wal").write_bytes(flipped(wal, bit))
            seen[outcome(Path(directory), written)] += 1
    print(seen)  # noqa: T201
    assert seen["the log does not open"] > 0


@pytest.fixture
def killed(memory: Path) -> Iterator[Path]:
    """As the test before leaves it, and no lock file that knows what was acknowledged: after a loss of power."""
    with closing(SqliteStore(memory / "events.db")) as store:
        write(store)
        copy = memory / "copy"
        copy.mkdir()
        for name in ("events.db", "events.db-wal"):
            shutil.copyfile(memory / name, copy / name)
        yield copy


def test_without_the_lock_file_only_the_last_transaction_can_go_unnoticed(killed: Path) -> None:
    wal = (killed / "events.db-wal").read_bytes()
    with closing(SqliteStore(killed / "events.db")) as store:
        written = store.read_all()
    frame = 24 + 4096
    frames = (len(wal) - 32) // frame
    ends = [n for n in range(frames) if any(wal[32 + n * frame + 4 : 32 + n * frame + 8])]
    for number in range(frames):
        (killed / "events.db").unlink()
        (killed / "events.db.lock").unlink(missing_ok=True)
        shutil.copyfile(killed.parent / "events.db", killed / "events.db")
        (killed / "events.db-wal").write_bytes(flipped(wal, (32 + number * frame + 2000) * 8))
        if number <= ends[-3]:
            assert outcome(killed, written) == "the log does not open"
        elif number > ends[-2]:
            with closing(SqliteStore(killed / "events.db")) as store:
                assert store.last_position() == 95


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)

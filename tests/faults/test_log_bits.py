"""Every bit of a log of 100 events, flipped: found, or without any effect on what is read."""

import multiprocessing
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from events import sqlite
from events.facts import Event
from events.sqlite import SqliteStore
from events.store import JobDamagedError, Recorded, StoreFailedError
from tests.events.facts_of_a_job import ADMITTED, SUBMITTED, VALIDATED, measured, started, step
from tests.events.support import add, check_all

JOBS = "abcd"


@pytest.fixture(autouse=True)
def stride(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 64 events of the hundred are in `streams`."""
    monkeypatch.setattr(sqlite, "_STRIDE", 64)


def write(store: SqliteStore, at_once: int = 5) -> None:
    """A hundred events of four jobs, in transactions of `at_once`."""
    facts: list[Event] = [SUBMITTED, VALIDATED, ADMITTED, started(1), *(measured(1, step(n)) for n in range(21))]
    new = [(job, f"{job}{n:02}", fact) for n, fact in enumerate(facts) for job in JOBS]
    for start in range(0, len(new), at_once):
        add(store, new[start : start + at_once])


def read(store: SqliteStore) -> tuple[list[Recorded], list[str]]:
    """The events that can be read, and all that a check says is wrong."""
    check_all(store)
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


def outcomes(left: Path, name: str, bits: Sequence[int], written: list[Recorded]) -> Counter[str]:
    """Of flipping each of these bits of that file, in what a process left behind."""
    content = (left / name).read_bytes()
    seen: Counter[str] = Counter()
    for bit in bits:
        with tempfile.TemporaryDirectory(dir=left.parent) as directory:
            shutil.copytree(left, directory, dirs_exist_ok=True)
            (Path(directory) / name).write_bytes(flipped(content, bit))
            seen[outcome(Path(directory), written)] += 1
    return seen


def flip(left: Path, name: str, sample: int | None, seed: int, written: list[Recorded]) -> Counter[str]:
    """A sample of the bits, or all of them; on all cores."""
    bits: Sequence[int] = range(8 * (left / name).stat().st_size)
    if sample is not None:
        bits = random.Random(seed).sample(bits, sample)  # noqa: S311  -- no secret
    cores = os.cpu_count() or 1
    # Forked, so that they have the stride of this process.
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        parts = [pool.submit(outcomes, left, name, bits[core::cores], written) for core in range(cores)]
        seen = sum((part.result() for part in parts), Counter[str]())
    print(dict(seen))  # noqa: T201
    assert seen.total() == len(bits)
    return seen


def test_a_flipped_bit_of_the_file_is_found_or_means_nothing(memory: Path, seed: int, long: bool) -> None:
    """What means nothing is room on a page that holds no event: the file may differ there, what is read does not."""
    left = memory / "left"
    left.mkdir()
    with closing(SqliteStore(left / "events.db")) as store:
        write(store)
        written, problems = read(store)
    assert (len(written), problems) == (100, [])
    seen = flip(left, "events.db", None if long else 250, seed, written)
    assert seen["reported"] > seen["the log does not open"]


def test_a_flipped_bit_of_the_write_ahead_log_is_found_or_means_nothing(memory: Path, seed: int, long: bool) -> None:
    """After a SIGKILL. SQLite alone would forget acknowledged events here, without a word. (In five transactions: each
    page that one changes is there once more, so twenty would have four times the bits, and no others.)"""
    alive, left = memory / "alive", memory / "left"
    alive.mkdir()
    with closing(SqliteStore(alive / "events.db")) as store:
        write(store, at_once=20)
        written, _ = read(store)
        shutil.copytree(alive, left)  # as a process leaves it that does not get to close it
    assert (left / "events.db-wal").stat().st_size > 50_000
    seen = flip(left, "events.db-wal", None if long else 150, seed, written)
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

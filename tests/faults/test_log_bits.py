"""Flips every bit of a log of 100 events: each is found, or has no effect on the events that are read."""

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
    """Of the hundred events, the first 64 are in `streams`."""
    monkeypatch.setattr(sqlite, "_STRIDE", 64)


def write(store: SqliteStore, at_once: int = 5) -> None:
    """A hundred events of four jobs, in transactions of `at_once`."""
    facts: list[Event] = [SUBMITTED, VALIDATED, ADMITTED, started(1), *(measured(1, step(n)) for n in range(21))]
    new = [(job, f"{job}{n:02}", fact) for n, fact in enumerate(facts) for job in JOBS]
    for start in range(0, len(new), at_once):
        add(store, new[start : start + at_once])


def read(store: SqliteStore) -> tuple[list[Recorded], list[str]]:
    """The events that can be read, and all problems that a check finds."""
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
    # Every event that is served was written, and if one is missing, that is reported.
    assert all(one in written for one in history)
    if problems:
        return "reported"
    assert history == written
    return "no effect"


def outcomes(left: Path, name: str, bits: Sequence[int], written: list[Recorded]) -> Counter[str]:
    """Counts the outcomes of flipping each of `bits` in the file `name` of the directory `left`, which a process has
    left behind."""
    content = (left / name).read_bytes()
    seen: Counter[str] = Counter()
    for bit in bits:
        with tempfile.TemporaryDirectory(dir=left.parent) as directory:
            shutil.copytree(left, directory, dirs_exist_ok=True)
            (Path(directory) / name).write_bytes(flipped(content, bit))
            seen[outcome(Path(directory), written)] += 1
    return seen


def flip(left: Path, name: str, sample: int | None, seed: int, written: list[Recorded]) -> Counter[str]:
    """The outcomes for a random sample of the file's bits, or for all (None). Uses all cores."""
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
    """Only a bit in unused space on a page has no effect: the events that are read are the same."""
    left = memory / "left"
    left.mkdir()
    with closing(SqliteStore(left / "events.db")) as store:
        write(store)
        written, problems = read(store)
    assert (len(written), problems) == (100, [])
    seen = flip(left, "events.db", None if long else 250, seed, written)
    assert seen["reported"] > seen["the log does not open"]


def test_a_flipped_bit_of_the_write_ahead_log_is_found_or_means_nothing(memory: Path, seed: int, long: bool) -> None:
    """After a SIGKILL. SQLite alone would silently forget acknowledged events here. (The events are in five
    transactions: each transaction writes the pages that it changes once more, so twenty would have four times the bits,
    but no others.)"""
    alive, left = memory / "alive", memory / "left"
    alive.mkdir()
    with closing(SqliteStore(alive / "events.db")) as store:
        write(store, at_once=20)
        written, _ = read(store)
        shutil.copytree(alive, left)  # as a killed process leaves it
    assert (left / "events.db-wal").stat().st_size > 50_000
    seen = flip(left, "events.db-wal", None if long else 150, seed, written)
    assert seen["the log does not open"] > 0


@pytest.fixture
def killed(memory: Path) -> Iterator[Path]:
    """The files after a loss of power: without the lock file, which holds the last acknowledged position."""
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

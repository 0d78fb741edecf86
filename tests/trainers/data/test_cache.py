"""The data cache: an entry is made once, shared, evicted, and never incomplete."""

import errno
import multiprocessing
import os
import threading
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import pytest
from filelock import FileLock

from tests.waiting import WAIT_S
from trainers.data.cache import DataCache, Make


class Maker:
    """Makes entries of one file, and counts."""

    def __init__(self, content: bytes = b"tokens") -> None:
        self.content, self.made = content, 0

    def __call__(self, directory: Path) -> None:
        self.made += 1
        (directory / "tokens.bin").write_bytes(self.content)


def fetch(cache: DataCache, key: str, make: Make, into: Path) -> Path:
    into.mkdir()
    cache.fetch(key, make, into, lambda _: None)
    return into / "tokens.bin"


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def test_an_entry_is_made_once_and_stored_once(tmp_path: Path) -> None:
    make = Maker()
    first, second = (fetch(DataCache(tmp_path / "cache", 1000), "a", make, tmp_path / name) for name in ("1", "2"))
    assert make.made == 1
    assert first.samefile(second)
    assert first.read_bytes() == b"tokens"


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    file = fetch(DataCache(tmp_path / "cache", 1000), "a", Maker(), tmp_path / "job")
    assert file.read_bytes() == b"tokens"
    assert file.stat().st_nlink == 1


def test_the_least_recently_used_entry_goes_first_and_its_jobs_keep_their_data(tmp_path: Path) -> None:
    cache = DataCache(tmp_path / "cache", 25)
    files = {key: fetch(cache, key, Maker(b"x" * 10), tmp_path / key) for key in ("a", "b")}
    for age, key in enumerate(("b", "a")):
        os.utime(tmp_path / "cache" / key, (1000 - age, 1000 - age))
    fetch(cache, "a", Maker(), tmp_path / "again")  # now b is the one that was not used for longest
    fetch(cache, "c", Maker(b"x" * 10), tmp_path / "c")
    assert visible(tmp_path / "cache") == ["a", "c"]
    assert files["b"].read_bytes() == b"x" * 10


def test_an_entry_that_is_too_large_for_the_cache_is_given_to_its_job_only(tmp_path: Path) -> None:
    file = fetch(DataCache(tmp_path / "cache", 0), "a", Maker(), tmp_path / "job")
    assert file.read_bytes() == b"tokens"
    assert visible(tmp_path / "cache") == []


def test_a_file_that_somebody_put_into_the_cache_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes.txt").touch()
    assert fetch(DataCache(tmp_path / "cache", 1000), "a", Maker(), tmp_path / "job").read_bytes() == b"tokens"
    assert visible(tmp_path / "cache") == ["a", "notes.txt"]


def test_an_entry_that_fails_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        Maker()(directory)
        raise ValueError("line 3")

    with pytest.raises(ValueError, match="line 3"):
        fetch(DataCache(tmp_path / "cache", 1000), "a", fail, tmp_path / "job")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".a.lock"]
    assert fetch(DataCache(tmp_path / "cache", 1000), "a", Maker(), tmp_path / "other").read_bytes() == b"tokens"


def test_leftovers_of_killed_runs_are_deleted_but_not_an_entry_in_the_making(tmp_path: Path) -> None:
    for name in (".dead.partial", ".alive.partial", ".x.evicted"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "tokens.bin").write_bytes(b"half")
    with FileLock(tmp_path / "cache" / ".alive.lock"):
        fetch(DataCache(tmp_path / "cache", 1000), "a", Maker(), tmp_path / "job")
    left = {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert left == {"a", ".alive.partial"}


def test_a_lock_file_goes_with_its_entry_unless_somebody_holds_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for key in ("a", "b"):
        fetch(DataCache(cache, 1000), key, Maker(), tmp_path / key)
    (cache / ".failed.lock").touch()  # what a job leaves whose data was refused
    with FileLock(cache / ".held.lock"):
        fetch(DataCache(cache, 6), "c", Maker(), tmp_path / "c")
    assert sorted(path.name for path in cache.iterdir()) == [".c.lock", ".held.lock", "c"]


def test_a_job_that_waits_for_a_lock_file_which_is_deleted_locks_the_next_one(tmp_path: Path) -> None:
    cache, waits = tmp_path / "cache", threading.Event()
    cache.mkdir()
    into = tmp_path / "job"
    into.mkdir()
    arguments = ("a", Maker(), into, lambda _: waits.set())
    waiting = threading.Thread(target=DataCache(cache, 1000).fetch, args=arguments)
    lock = cache / ".a.lock"
    with FileLock(lock):
        waiting.start()
        assert waits.wait(WAIT_S)
        lock.unlink()
    waiting.join(WAIT_S)
    assert (into / "tokens.bin").read_bytes() == b"tokens"
    assert lock.exists()


def test_an_entry_that_is_evicted_before_it_is_linked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, make = DataCache(tmp_path / "cache", 1000), Maker()
    utime = os.utime

    def evict_once(entry: Path) -> None:
        monkeypatch.setattr(os, "utime", utime)
        entry.rename(entry.with_name(".x.evicted"))
        utime(entry)

    monkeypatch.setattr(os, "utime", evict_once)
    assert fetch(cache, "a", make, tmp_path / "job").read_bytes() == b"tokens"
    assert make.made == 2


def fetch_together(root: Path, number: int, waiting: Semaphore) -> None:
    """As one of three: whoever makes the entry is not done before the other two wait for it."""

    def make(directory: Path) -> None:
        with (root / "makers").open("a") as file:
            file.write(f"{number}\n")
        for _ in range(2):
            assert waiting.acquire(timeout=WAIT_S)
        Maker()(directory)

    into = root / f"job{number}"
    into.mkdir()
    DataCache(root / "cache", 1000).fetch("a", make, into, lambda _: waiting.release())


def test_concurrent_jobs_make_an_entry_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    waiting = context.Semaphore(0)
    processes = [context.Process(target=fetch_together, args=(tmp_path, number, waiting)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len((tmp_path / "makers").read_text().splitlines()) == 1
    files = [tmp_path / f"job{number}" / "tokens.bin" for number in range(3)]
    assert len({file.stat().st_ino for file in files}) == 1

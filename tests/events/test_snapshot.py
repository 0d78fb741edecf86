"""Snapshots make a start quick and change nothing else."""

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import log, snapshot
from events.facts import Event
from events.job import FineTuningJob, evolve
from events.log import EventLog
from events.memory import MemoryStore
from events.snapshot import restore, take
from events.sqlite import SqliteStore
from events.store import Recorded
from tests.events.any_event import events
from tests.events.facts_of_a_job import CANCEL, CANCELLED, RUNNING, START, SUBMITTED, measured, saved, step
from tests.events.support import add, append, opened, submit
from tests.waiting import WAIT_S, async_eventually


def stored(histories: list[list[Event]]) -> tuple[MemoryStore, list[FineTuningJob]]:
    """A store with one job for each history, whose events take turns; and the jobs after them."""
    store = MemoryStore()
    jobs: dict[int, FineTuningJob] = {}
    for number in range(max(map(len, histories), default=0)):
        for job_id, history in enumerate(histories):
            if number < len(history):
                new = str(job_id), f"{job_id}:{number}", history[number]
                [recorded] = add(store, [new], START + timedelta(seconds=number))
                jobs[job_id] = evolve(jobs.get(job_id), recorded)
    return store, list(jobs.values())


@given(st.lists(st.lists(events, min_size=1, max_size=5).map(lambda more: [*RUNNING, *more]), min_size=1, max_size=3))
def test_jobs_come_back_from_a_snapshot_as_they_were(histories: list[list[Event]]) -> None:
    store, jobs = stored(histories)
    restored = restore(take(jobs, store.read_all()[-1]), store)
    # By their looks, since a NaN equals nothing. A time that was parsed calls its UTC another name.
    assert repr(restored.all()).replace("TzInfo(0)", "datetime.timezone.utc") == repr(jobs)
    assert [job.job_id for job in restored.live()] == [job.job_id for job in jobs if not job.over]
    assert restored.live_count() == len(restored.live())
    assert (restored.position, restored.time) == (store.last_position(), store.read_all()[-1].time)
    assert all(restored.with_key(key) for job in jobs if (key := job.idempotency_key) is not None)


class CountedReads(MemoryStore):
    """Records the positions that it was read after."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []

    def read_all(self, after_position: int = 0, limit: int = 1000) -> list[Recorded]:
        self.reads.append(after_position)
        return super().read_all(after_position, limit)


def test_a_start_reads_only_what_came_after_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_SNAPSHOT_EVENTS", 10)
    event = SUBMITTED.model_copy(update={"idempotency_key": "k"})

    async def scenario() -> None:
        store = CountedReads()
        async with opened(store) as first:
            await submit(first, "a", event)
            for number in range(9):
                await submit(first, f"b{number}")
            await async_eventually(lambda: store.snapshot() is not None, WAIT_S, lambda: "no snapshot is kept")
            await append(first, "b0", CANCEL, CANCELLED)
            before = await first.jobs(20), await first.live_jobs()
        store.reads.clear()
        async with opened(store) as second:
            assert min(store.reads) == 9  # whether the snapshot is of this log
            assert (await second.jobs(20), await second.live_jobs()) == before
            assert (await second.submit("c", event, "c", 20)).job_id == "a"

    asyncio.run(scenario())


def test_a_snapshot_of_a_long_log_is_written_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "events.db") as first:
            for number in range(20):
                await submit(first, f"a{number}")
        monkeypatch.setattr(log, "_SNAPSHOT_EVENTS", 10)
        async with opened(tmp_path / "events.db"):
            snapshot = tmp_path / "events.db.snapshot"
            await async_eventually(snapshot.exists, WAIT_S, lambda: "no snapshot is written")
            assert all(f'"a{number}"'.encode() in snapshot.read_bytes() for number in range(20))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda kept: kept[:-1], "damaged"),
        (lambda kept: kept.replace(b"validation", b"validatioN"), "damaged"),
        (lambda _: b"", "damaged"),
        (lambda _: b"0000000000\n", "Invalid JSON"),
    ],
)
def test_a_spoiled_snapshot_is_not_used(
    spoil: Callable[[bytes], bytes], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, jobs = stored([[SUBMITTED], [SUBMITTED]])
    store.keep_snapshot(spoil(take(jobs, store.read_all()[-1])))

    async def scenario() -> None:
        async with opened(store) as opened_log:
            assert len((await opened_log.live_jobs()).jobs) == 2

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert why in caplog.text


def test_a_snapshot_of_other_code_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store, jobs = stored([[SUBMITTED]])
    kept = take(jobs, store.read_all()[-1])
    monkeypatch.setattr(snapshot, "_code", lambda: 7)
    with pytest.raises(ValueError, match="another version"):
        restore(kept, store)


def test_a_snapshot_of_another_log_is_not_used() -> None:
    """As after an older backup was restored, and other things happened since."""
    store, jobs = stored([[SUBMITTED, CANCEL]])
    kept = take(jobs, store.read_all()[-1])
    shorter, _ = stored([[SUBMITTED]])
    with pytest.raises(ValueError, match="another log"):
        restore(kept, shorter)
    add(shorter, [("9", "other", SUBMITTED)])
    with pytest.raises(ValueError, match="another log"):
        restore(kept, shorter)


def test_a_snapshot_that_can_not_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "events.db")
    store.keep_snapshot(b"one")
    (tmp_path / "events.db.snapshot.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        store.keep_snapshot(b"two")
    assert store.snapshot() == b"one"
    store.close()


def test_no_snapshot_is_written_of_a_log_with_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next start finds the damage again."""
    monkeypatch.setattr(log, "_SNAPSHOT_EVENTS", 1)

    async def scenario() -> None:
        store = MemoryStore()
        one = EventLog(store)
        one._jobs.damage("x", "flipped")
        await submit(one, "a")
        await one.close()
        assert store.snapshot() is None

    asyncio.run(scenario())


def test_progress_and_the_last_checkpoint_are_in_a_snapshot() -> None:
    history: list[Event] = [*RUNNING, measured(1, step(5)), saved(1, 5), measured(1, step(7, loss=float("nan")))]
    store, [job] = stored([history])
    [again] = restore(take([job], store.read_all()[-1]), store).all()
    assert (again.saved, again.progress, again.version, again.admitted) == (job.saved, job.progress, 6, True)


class TenthIsDamaged(MemoryStore):
    """The event at position 10 can't be read again, like one on a page that was damaged. Another follows it by then."""

    def read_all(self, after_position: int = 0, limit: int = 1000) -> list[Recorded]:
        if self.last_position() == 10:
            add(self, [("c", "c", SUBMITTED)])
        return [one for one in super().read_all(after_position, limit + 1) if one.position != 10][:limit]


def test_no_snapshot_is_written_whose_last_event_can_not_be_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If it took the position of the next event it can read, the next start would leave that event out."""
    monkeypatch.setattr(log, "_SNAPSHOT_EVENTS", 10)

    async def scenario() -> None:
        store = TenthIsDamaged()
        add(store, [(f"a{number}", f"a{number}", SUBMITTED) for number in range(9)])
        async with opened(store) as opened_log:
            await submit(opened_log, "b")
            await async_eventually(
                lambda: store.snapshot() is not None or "no snapshot" in caplog.text, WAIT_S, lambda: "nothing happens"
            )
        assert store.snapshot() is None

    asyncio.run(scenario())
    assert "no snapshot of the event log was written: its last event can't be read" in caplog.text

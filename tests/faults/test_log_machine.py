"""Clients' operations and crashes in any order: a Hypothesis state machine on a log in a real file."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from events import log, sqlite
from events.decide import Refused
from events.facts import Event, JobSucceeded
from events.job import FineTuningJob, fold
from events.log import EventLog
from events.sqlite import SqliteStore
from tests.events.facts_of_a_job import (
    ADMITTED,
    CANCEL,
    CANCELLED,
    FAILED,
    REJECTED,
    SUBMITTED,
    SUCCEEDED,
    VALIDATED,
    interrupted,
    measured,
    saved,
    started,
    step,
)

T = TypeVar("T")
JOBS = st.sampled_from(["a", "b", "c"])
ATTEMPTS = st.integers(1, 3)
FACTS: st.SearchStrategy[Event] = st.one_of(
    st.sampled_from([VALIDATED, REJECTED, ADMITTED, CANCEL, CANCELLED, SUCCEEDED, FAILED]),
    ATTEMPTS.map(started),
    ATTEMPTS.map(interrupted),
    st.builds(measured, ATTEMPTS, st.builds(step, st.integers(1, 9))),
    st.builds(saved, ATTEMPTS, st.integers(1, 9)),
)


class Machine(RuleBasedStateMachine):
    """Remembers every acknowledged append, and each job's last state."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tw-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.lives = 0
        self.loop = asyncio.new_event_loop()
        self.sent: list[tuple[str, list[Event], list[str]]] = []
        self.seen: dict[str, FineTuningJob] = {}
        self.opened: list[EventLog] = []

    @initialize()
    def start(self) -> None:
        self.log = EventLog(SqliteStore(self.directory / "0" / "events.db"))
        self.opened.append(self.log)

    def run(self, call: Awaitable[T]) -> T | None:
        async def awaited() -> T:
            return await call

        try:
            return self.loop.run_until_complete(awaited())
        except Refused:
            return None

    @rule(job_id=JOBS)
    def submit(self, job_id: str) -> None:
        event_id = f"{job_id}:submit:{len(self.sent)}"
        if self.run(self.log.submit(job_id, SUBMITTED, event_id, 10)) is not None:
            self.sent.append((job_id, [SUBMITTED], [event_id]))

    @rule(job_id=JOBS, facts=st.lists(FACTS, min_size=1, max_size=3))
    def report(self, job_id: str, facts: list[Event]) -> None:
        ids = [f"{job_id}:{len(self.sent)}:{number}" for number in range(len(facts))]
        if self.run(self.log.append(job_id, facts, ids)) is not None:
            self.sent.append((job_id, facts, ids))

    @rule(job_id=JOBS)
    def run_it(self, job_id: str) -> None:
        """Takes a job through validation to a run, as most jobs go: random facts alone seldom get that far."""
        self.report(job_id, [VALIDATED])
        self.report(job_id, [ADMITTED])
        self.report(job_id, [started(1)])

    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        """Repeats an append that was written at any time before."""
        written = {one.event_id for one in self.run(self.log.subscribe(0)) or []}
        reports = [one for one in self.sent if one[1] != [SUBMITTED] and written.issuperset(one[2])]
        if not reports:
            return
        job_id, facts, ids = data.draw(st.sampled_from(reports))
        before = self.run(self.log.job(job_id))
        assert looks(self.run(self.log.append(job_id, facts, ids))) == looks(before)

    @rule()
    def crash(self) -> None:
        """The next process has only what is on disk now."""
        self.lives += 1
        shutil.copytree(self.directory / str(self.lives - 1), self.directory / str(self.lives))
        self.log = EventLog(SqliteStore(self.directory / str(self.lives) / "events.db"))
        self.opened.append(self.log)

    @rule()
    def restart(self) -> None:
        self.run(self.log.close())
        self.opened.remove(self.log)
        self.log = EventLog(SqliteStore(self.directory / str(self.lives) / "events.db"))
        self.opened.append(self.log)

    @invariant()
    def every_job_is_the_fold_of_its_events_and_ends_once(self) -> None:
        if not hasattr(self, "log"):
            return
        for job_id in "abc":
            history = self.run(self.log.read(job_id)) or []
            job = self.run(self.log.job(job_id))
            # Compared as text: times from a snapshot have another class of UTC, whose name `looks` replaces.
            assert looks(fold(history)) == looks(job)
            over = False
            for end in range(1, len(history) + 1):  # each prefix was the job's history at some time
                prefix = fold(history[:end])
                assert prefix is not None
                assert not over
                over = prefix.over
                assert not (prefix.cancel_requested and prefix.status == "success")
            if job is not None and job.cancel_requested:
                assert not any(isinstance(one.event, JobSucceeded) for one in history)
            if (before := self.seen.get(job_id)) is not None:
                assert job is not None
                assert job.version >= before.version
                assert not before.over or looks(job) == looks(before)
            if job is not None:
                self.seen[job_id] = job

    def teardown(self) -> None:
        for one in self.opened:
            self.run(one.close())
        self.loop.close()
        shutil.rmtree(self.directory)


def looks(job: FineTuningJob | None) -> Any:
    return repr(job).replace("TzInfo(0)", "datetime.timezone.utc")


def test_jobs_keep_their_rules_whatever_happens(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_SNAPSHOT_EVENTS", 3)  # starts from snapshots too
    monkeypatch.setattr(sqlite, "_STRIDE", 4)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=1000 if long else 15,
            stateful_step_count=50 if long else 25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

"""A log that a newer version of Tunewright has written to: nothing is lost, and the operator is told."""

import asyncio
from pathlib import Path

import pytest

from events.codec import AnyEvent, UnknownEvent
from events.decide import Refused
from events.facts import CancelRequested
from events.sqlite import SqliteStore
from tests.events.facts_of_a_job import SUBMITTED, VALIDATED
from tests.events.support import add, append, history_of, opened

ARCHIVED = UnknownEvent("JobArchived", '{"type":"JobArchived","v":1,"by":"user"}')
VALIDATED_2 = UnknownEvent("DataValidated", '{"type":"DataValidated","v":2,"shards":[1,2]}')
SUBMITTED_2 = UnknownEvent("JobSubmitted", '{"type":"JobSubmitted","v":2,"plan":{}}')


def written(directory: Path, *events: tuple[str, str, AnyEvent]) -> Path:
    store = SqliteStore(directory / "events.db")
    add(store, events)
    store.close()
    return directory / "events.db"


def test_events_that_this_version_does_not_know_are_named_once_for_each_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(
        tmp_path,
        ("a", "a0", SUBMITTED), ("a", "a1", VALIDATED_2), ("b", "b0", SUBMITTED), ("b", "b1", VALIDATED_2),
        ("b", "b2", ARCHIVED),
    )  # fmt: skip

    async def scenario() -> None:
        async with opened(file) as log:
            assert (await log.job("a")).status == "validation"
            await append(log, "a", VALIDATED, CancelRequested())
            assert (await log.job("b")).version == 2

    asyncio.run(scenario())
    told = [message.partition(". A newer version")[0] for message in caplog.messages]
    assert [message for message in told if "can't read" in message] == [
        "this version of Tunewright can't read events of type DataValidated version 2 and ignores them (2 in all)",
        "this version of Tunewright can't read events of type JobArchived version 1 and ignores them (1 in all)",
    ]
    assert [recorded.event for recorded in history_of(tmp_path)][1:5:3] == [VALIDATED_2, ARCHIVED]


def test_a_job_that_a_newer_version_began_is_not_served_and_nothing_is_written_to_it(tmp_path: Path) -> None:
    """An empty config would make the dispatcher fail it, for the newer version as well."""
    file = written(tmp_path, ("a", "a0", SUBMITTED_2), ("a", "a1", VALIDATED), ("b", "b0", SUBMITTED))

    async def scenario() -> None:
        async with opened(file) as log:
            for call in (log.job("a"), log.read("a"), append(log, "a", CancelRequested())):
                with pytest.raises(Refused, match="can't read its first event, JobSubmitted version 2") as refused:
                    await call
                assert refused.value.code == "job_damaged"
                assert "run the version that wrote it" in str(refused.value)
            assert [job.job_id for job in (await log.live_jobs()).jobs] == ["b"]
            jobs, _ = await log.jobs(10)
            assert [job.job_id for job in jobs] == ["b"]
            await append(log, "b", VALIDATED)

    asyncio.run(scenario())
    assert [recorded.job_id for recorded in history_of(tmp_path)] == ["a", "a", "b", "b"]

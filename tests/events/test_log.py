"""`EventLog` as a plain class: what it decides, keeps and tells."""

import asyncio
import json
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from events.decide import Refused
from events.jobs import Draft, Jobs
from events.log import LogUnavailable
from events.memory import MemoryStore
from events.store import ExpectedVersionError, NewEvent, Recorded
from tests.events.facts_of_a_job import (
    ADMITTED,
    CANCEL,
    CANCELLED,
    CONFIG,
    FAILED,
    START,
    SUBMITTED,
    SUCCEEDED,
    VALIDATED,
    measured,
    saved,
    started,
    step,
)
from tests.events.support import append, full_disk, opened, submit


def test_a_submitted_job_is_on_disk_when_submit_returns(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "events.db") as log:
            job = await log.submit("a", SUBMITTED, "e1", 10)
        async with opened(tmp_path / "events.db") as log:
            assert await log.job("a") == job
            assert [one.event for one in await log.read("a")] == [SUBMITTED]

    asyncio.run(scenario())


def test_a_retried_submit_is_one_job() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            first = await log.submit("a", SUBMITTED, "e1", 1)
            assert await log.submit("a", SUBMITTED, "e1", 1) == first
            assert len(await log.read("a")) == 1

    asyncio.run(scenario())


def test_an_idempotency_key_brings_back_its_job_when_the_config_is_the_same() -> None:
    async def scenario() -> None:
        event = SUBMITTED.model_copy(update={"idempotency_key": "k"})
        other = event.model_copy(update={"config": {**CONFIG, "model": "other"}})
        async with opened(MemoryStore()) as log:
            assert await log.job_with_key("k") is None
            first = await log.submit("a", event, "e1", 1)
            assert await log.submit("b", event, "e2", 1) == first == await log.job_with_key("k")
            with pytest.raises(Refused, match="was used for job a") as refused:
                await log.submit("c", other, "e3", 10)
            assert refused.value.code == "idempotency_key_reused"

    asyncio.run(scenario())


def test_concurrent_submits_with_one_idempotency_key_are_one_job() -> None:
    async def scenario() -> None:
        event = SUBMITTED.model_copy(update={"idempotency_key": "k"})
        async with opened(MemoryStore()) as log:
            jobs = await asyncio.gather(*(log.submit(f"j{number}", event, f"e{number}", 10) for number in range(8)))
            assert {job.job_id for job in jobs} == {"j0"}

    asyncio.run(scenario())


def test_an_idempotency_key_is_remembered_after_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        event = SUBMITTED.model_copy(update={"idempotency_key": "k"})
        async with opened(tmp_path / "events.db") as log:
            await log.submit("a", event, "e1", 10)
        async with opened(tmp_path / "events.db") as log:
            assert (await log.submit("b", event, "e2", 10)).job_id == "a"

    asyncio.run(scenario())


def test_an_identical_request_within_a_minute_brings_back_a_job_until_its_answer_is_known_to_have_arrived(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        event = SUBMITTED.model_copy(update={"request_digest": "d"})
        async with opened(tmp_path / "events.db") as log:
            await log.submit("a", event, "e1", 1)
            assert (await log.submit("b", event, "e2", 1)).job_id == "a"
            await log.answered("a")
            assert (await log.submit("b", event, "e2", 1, retried=True)).job_id == "a"
            assert (await log.submit("c", event, "e3", 10)).job_id == "c"
            assert (await log.submit("d", event, "e4", 10)).job_id == "c"  # of several, the last one
            await log.answered("c")
        async with opened(tmp_path / "events.db") as log:  # nobody knows any more: the safe side
            assert (await log.submit("e", event, "e5", 10)).job_id == "c"

    asyncio.run(scenario())


@pytest.mark.parametrize("retried", [False, True])
def test_a_minute_later_an_identical_request_is_another_job(retried: bool) -> None:
    event = SUBMITTED.model_copy(update={"request_digest": "d"})
    jobs = Jobs()
    for seconds, job_id, made in ((0, "a", "a"), (60, "b", "a"), (61, "b", "b")):
        draft = Draft(jobs)
        new, time = NewEvent.of(f"e{seconds}", event), START + timedelta(seconds=seconds)
        assert draft.submit(job_id, new, 10, time, retried=retried).job_id == made
        jobs.adopt(draft)


def test_requests_and_their_answers_are_forgotten_once_no_repetition_can_come() -> None:
    jobs = Jobs()
    for number in range(200):
        event = SUBMITTED.model_copy(update={"request_digest": f"d{number}"})
        draft = Draft(jobs)
        draft.submit(f"j{number}", NewEvent.of(f"e{number}", event), 1000, START + timedelta(seconds=number))
        jobs.adopt(draft)
        jobs.answer(f"j{number}")
    remembered = [number for number in range(200) if jobs.with_digest(f"d{number}") is not None]
    assert remembered == [number for number in range(200) if jobs.is_answered(f"j{number}")] == [*range(139, 200)]
    jobs.answer("j0")  # told late: nobody will ask
    assert not jobs.is_answered("j0")


def test_only_so_many_jobs_may_be_unfinished() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            outcomes = await asyncio.gather(
                *(submit(log, f"j{number}", limit=2) for number in range(4)), return_exceptions=True
            )
            assert [getattr(outcome, "code", None) for outcome in outcomes] == [None, None, *["too_many_jobs"] * 2]
            await append(log, "j0", CANCEL, CANCELLED)
            await submit(log, "j4", limit=2)

    asyncio.run(scenario())


def test_a_refused_fact_takes_the_rest_of_its_append_with_it() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            await submit(log, "a")
            with pytest.raises(Refused):
                await append(log, "a", VALIDATED, SUCCEEDED)
            assert (await log.job("a")).status == "validation"
            assert len(await log.read("a")) == 1

    asyncio.run(scenario())


def test_a_retried_append_is_not_decided_again() -> None:
    """`RunStarted(1)` could not be true a second time; its retry finds it written and says so."""

    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            await submit(log, "a")
            for _ in range(2):
                job = await log.append("a", [VALIDATED, ADMITTED, started(1)], ["e1", "e2", "e3"])
            assert (job.status, job.version) == ("running", 3)

    asyncio.run(scenario())


def test_a_retry_in_the_same_commit_is_one_event() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            await submit(log, "a")
            jobs = await asyncio.gather(*(log.append("a", [VALIDATED, started(1)], ["e1", "e2"]) for _ in range(3)))
            assert {job.version for job in jobs} == {2}

    asyncio.run(scenario())


def test_a_stale_writer_is_refused_with_the_versions() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            await submit(log, "a")
            await append(log, "a", VALIDATED, expected=0)
            with pytest.raises(ExpectedVersionError, match="job a: expected version 0, is 1"):
                await append(log, "a", ADMITTED, expected=0)

    asyncio.run(scenario())


def test_of_two_outcomes_proposed_at_once_one_wins() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            await submit(log, "a")
            await append(log, "a", VALIDATED, started(1))
            outcomes = await asyncio.gather(
                append(log, "a", SUCCEEDED), append(log, "a", FAILED), return_exceptions=True
            )
            assert outcomes[0] is None
            assert isinstance(outcomes[1], Refused)
            assert (await log.job("a")).status == "success"

    asyncio.run(scenario())


def test_an_unknown_job_is_refused_everywhere() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            for call in (
                log.job("x"),
                log.job_json("x"),
                log.append("x", [CANCEL], ["e"]),
                log.wait("x", -1, 0),
            ):
                with pytest.raises(Refused) as refused:
                    await call
                assert refused.value.code == "unknown_job"
            with pytest.raises(Refused) as refused:
                await log.jobs(5, "x")
            assert refused.value.code == "unknown_after"
            assert await log.read("x") == []

    asyncio.run(scenario())


def test_jobs_are_paged_newest_first() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            for job_id in "abcde":
                await submit(log, job_id)
            page, more = await log.jobs(2)
            assert ([job.job_id for job in page], more) == (["e", "d"], True)
            page, more = await log.jobs(2, "d")
            assert ([job.job_id for job in page], more) == (["c", "b"], True)
            page, more = await log.jobs(2, "b")
            assert ([job.job_id for job in page], more) == (["a"], False)

    asyncio.run(scenario())


def test_live_jobs_are_those_without_an_outcome_oldest_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "events.db") as log:
            for job_id in "abc":
                await submit(log, job_id)
            await append(log, "b", CANCEL, CANCELLED)
            await append(log, "a", VALIDATED)
            assert [job.job_id for job in (await log.live_jobs()).jobs] == ["a", "c"]
        async with opened(tmp_path / "events.db") as log:
            assert [job.job_id for job in (await log.live_jobs()).jobs] == ["a", "c"]

    asyncio.run(scenario())


def test_the_json_of_a_job_is_that_of_its_last_version() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            await submit(log, "a")
            assert json.loads(await log.job_json("a"))["status"] == "validation"
            assert await log.job_json("a") is await log.job_json("a")
            await append(log, "a", VALIDATED)
            assert await log.job_json("a") == (await log.job("a")).wire_json()

    asyncio.run(scenario())


def test_a_subscriber_gets_every_event_once_in_order() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            await submit(log, "a")
            seen: list[Recorded] = []

            async def follow() -> None:
                while len(seen) < 9:
                    seen.extend(await log.subscribe(seen[-1].position if seen else 0, 2, wait_s=5))

            follower = asyncio.create_task(follow())
            await asyncio.gather(*(submit(log, f"j{number}") for number in range(7)))
            await append(log, "a", VALIDATED)
            await asyncio.wait_for(follower, 60)
            assert [one.position for one in seen] == list(range(1, 10))

    asyncio.run(scenario())


def test_a_subscriber_with_nothing_to_read_gets_nothing_when_time_is_up() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            assert await log.subscribe(0, wait_s=0.01) == []

    asyncio.run(scenario())


def test_waiting_for_a_job_returns_when_it_changes_and_not_before() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            await submit(log, "a")
            await submit(log, "b")
            waiting = asyncio.create_task(log.wait("a", 0, 600))
            await append(log, "b", VALIDATED)
            assert not waiting.done()
            await append(log, "a", VALIDATED)
            assert (await asyncio.wait_for(waiting, 60)).status == "queued"
            assert (await log.wait("a", 0, 600)).version == 1
            assert (await log.wait("a", 1, 0.01)).version == 1

    asyncio.run(scenario())


def test_an_event_that_can_not_be_written_as_json_is_refused_alone() -> None:
    async def scenario() -> None:
        async with opened(MemoryStore()) as log:
            bad = SUBMITTED.model_copy(update={"config": {"model": "\ud800"}})
            outcomes = await asyncio.gather(
                log.submit("a", bad, "e1", 10), log.submit("b", SUBMITTED, "e2", 10), return_exceptions=True
            )
            assert getattr(outcomes[0], "code", None) == "invalid_event"
            assert [job.job_id for job in (await log.live_jobs()).jobs] == ["b"]

    asyncio.run(scenario())


class GatedStore(MemoryStore):
    """Holds each append until its gate opens, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.appends = 0

    def append(self, batch: Sequence[tuple[Recorded, str]]) -> None:
        self.entered.set()
        assert self.gate.wait(10)
        self.appends += 1
        super().append(batch)


def test_appends_that_arrive_during_a_commit_share_the_next_one_and_the_loop_stays_free() -> None:
    async def scenario() -> None:
        store = GatedStore()
        async with opened(store) as log:
            submits = [asyncio.create_task(submit(log, "j0"))]
            assert await asyncio.to_thread(store.entered.wait, 10)
            submits += [asyncio.create_task(submit(log, f"j{number}")) for number in range(1, 50)]
            assert (await log.live_jobs()).jobs == []  # answers while the commit is in flight, and shows none of it
            store.gate.set()
            await asyncio.gather(*submits)
            assert store.appends == 2
            assert len((await log.live_jobs()).jobs) == 50

    asyncio.run(scenario())


def test_a_caller_that_has_gone_does_not_hold_up_the_others() -> None:
    async def scenario() -> None:
        store = GatedStore()
        async with opened(store) as log:
            gone = asyncio.create_task(submit(log, "a"))
            stays = asyncio.create_task(submit(log, "b"))
            assert await asyncio.to_thread(store.entered.wait, 10)
            gone.cancel()
            store.gate.set()
            await stays
            assert [job.job_id for job in (await log.live_jobs()).jobs] == ["a", "b"]

    asyncio.run(scenario())


def test_a_failed_commit_is_reported_and_the_next_one_goes_on_from_what_is_on_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "events.db"
        async with opened(path) as log:
            await submit(log, "a")
            with full_disk(tmp_path / "events.db-wal"), pytest.raises(LogUnavailable, match="could not commit"):
                await append(log, "a", VALIDATED)
            assert (await log.job("a")).status == "validation"
            await append(log, "a", VALIDATED)
            assert [one.version for one in await log.read("a")] == [0, 1]
        async with opened(path) as log:
            assert (await log.job("a")).status == "queued"

    asyncio.run(scenario())


class LyingStore(MemoryStore):
    """Its first append is written but reports a failure, as if the disk's acknowledgement was lost."""

    def __init__(self) -> None:
        super().__init__()
        self.lies = 1

    def append(self, batch: Sequence[tuple[Recorded, str]]) -> None:
        super().append(batch)
        if self.lies:
            self.lies -= 1
            raise OSError("input/output error")


def test_a_commit_that_failed_but_was_written_is_found_again() -> None:
    async def scenario() -> None:
        async with opened(LyingStore()) as log:
            with pytest.raises(LogUnavailable):
                await submit(log, "a")
            await submit(log, "b")
            assert [job.job_id for job in (await log.live_jobs()).jobs] == ["a", "b"]
            await submit(log, "a")  # the retry: it was there
            assert [one.job_id for one in await log.subscribe(0)] == ["a", "b"]

    asyncio.run(scenario())


def test_a_replayed_log_has_the_same_jobs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "events.db") as log:
            for job_id in "ab":
                await submit(log, job_id)
                await append(log, job_id, VALIDATED, ADMITTED, started(1), measured(1, step(1)), saved(1, 1))
            await append(log, "b", SUCCEEDED)
            before = await log.jobs(10)
        async with opened(tmp_path / "events.db") as log:
            assert await log.jobs(10) == before

    asyncio.run(scenario())

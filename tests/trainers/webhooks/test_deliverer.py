"""Deliveries: a real event log, a real receiver, and everything in between."""

import asyncio
import random
import stat
import time
from collections import defaultdict
from pathlib import Path

import pytest

from events.log import EventLog
from events.memory import MemoryStore
from events.store import Recorded
from tests.trainers.webhooks.conftest import Play
from tests.trainers.webhooks.support import (
    IMPATIENT,
    SLOW,
    TYPES,
    all_deliveries,
    delivering,
    end_job,
    endpoint,
    log_in,
    settings_in,
    until_settled,
)
from tests.waiting import WAIT_S, async_eventually
from tests.webhook_receiver import Answer, Receiver, verified
from trainers.errors import UserError
from trainers.webhooks.deliverer import Pace, WebhooksUnavailable
from trainers.webhooks.store import new_secret


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("succeeded", "fine_tuning.job.succeeded"),
        ("failed", "fine_tuning.job.failed"),
        ("rejected", "fine_tuning.job.failed"),
        ("cancelled", "fine_tuning.job.cancelled"),
    ],
)
def test_the_request_for_a_job_that_is_over_is_that_of_openai(play: Play, tmp_path: Path, how: str, kind: str) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver() as receiver:
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                created = await endpoint(webhooks, receiver.url + "?token=mine")
                await end_job(log, "ftjob-1", how)
                (delivery,) = await until_settled(webhooks, created.endpoint.id, "delivered")
        (got,) = receiver.got
        event = verified(got, created.secret)
        assert (event.type, event.object, event.data.id) == (kind, "event", "ftjob-1")
        assert event.id.startswith("evt_")
        finished_at = (await log.job("ftjob-1")).finished_at
        assert finished_at is not None
        assert event.created_at == int(finished_at.timestamp())
        assert got.path == "/hook?token=mine"
        assert got.headers["content-type"] == "application/json"
        assert got.headers["host"] == f"127.0.0.1:{receiver.port}"
        assert (delivery.notice.event_id, delivery.attempts, delivery.last_status_code) == (event.id, 1, 200)

    play(scenario)


def test_a_thousand_jobs_reach_a_receiver_that_fails_every_third_time(play: Play, tmp_path: Path) -> None:
    chance = random.Random(7)  # noqa: S311  -- no secret
    jobs = [f"ftjob-{number}" for number in range(1000)]
    ways = ["succeeded", "failed", "rejected", "cancelled"]
    failures: list[Answer] = [500, 503, 429, "drop", "hang"]

    def answer(_: int) -> Answer:
        return chance.choice(failures) if chance.random() < 0.3 else 200

    async def scenario(log: EventLog) -> None:
        with Receiver(answer) as receiver:
            async with delivering(log, settings_in(tmp_path), IMPATIENT) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                for number, job_id in enumerate(jobs):
                    await end_job(log, job_id, ways[number % 4])
                await async_eventually(
                    lambda: len(receiver.delivered()) >= len(jobs), WAIT_S, lambda: "fewer good answers than jobs"
                )
                await until_settled(webhooks, created.endpoint.id, "delivered", len(jobs))
        events = defaultdict(set)
        for got in receiver.got:
            event = verified(got, created.secret)
            events[event.data.id].add((got.headers["webhook-id"], event.type, got.body))
        assert events.keys() == set(jobs)
        assert {len(seen) for seen in events.values()} == {1}  # a retry says the same under the same id
        assert len({event_id for seen in events.values() for event_id, _, _ in seen}) == len(jobs)
        assert {verified(got, created.secret).data.id for got in receiver.delivered()} == set(jobs)
        assert len(receiver.got) > 1300

    play(scenario)


def test_a_slow_receiver_holds_up_nobody_else(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver(lambda _: "hang") as slow, Receiver() as quick:
            async with delivering(log, settings_in(tmp_path), SLOW) as webhooks:
                of_slow = await endpoint(webhooks, slow.url)
                of_quick = await endpoint(webhooks, quick.url)
                for number in range(40):
                    await end_job(log, f"ftjob-{number}")
                await until_settled(webhooks, of_quick.endpoint.id, "delivered", 40)
                waiting = await all_deliveries(webhooks, of_slow.endpoint.id)
                assert {delivery.status for delivery in waiting} == {"pending"}
                assert len(slow.got) == SLOW.in_flight

    play(scenario)


def test_an_endpoint_gets_the_events_it_asked_for_and_none_from_before_its_creation(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver() as receiver:
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                await end_job(log, "ftjob-before", "failed")
                everything = await endpoint(webhooks, receiver.url)
                await end_job(log, "ftjob-then", "failed")
                failures = await endpoint(webhooks, receiver.url, "fine_tuning.job.failed")
                await end_job(log, "ftjob-1", "succeeded")
                await end_job(log, "ftjob-2", "failed")
                (told,) = await until_settled(webhooks, failures.endpoint.id, "delivered")
                assert told.notice.job_id == "ftjob-2"
                told_all = await until_settled(webhooks, everything.endpoint.id, "delivered", 3)
                assert [one.notice.job_id for one in told_all] == ["ftjob-2", "ftjob-1", "ftjob-then"]

    play(scenario)


def test_jobs_that_end_while_nothing_runs_are_delivered_after_the_next_start(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver() as receiver:
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                created = await endpoint(webhooks, receiver.url)
            for number in range(3):
                await end_job(log, f"ftjob-{number}")
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                await until_settled(webhooks, created.endpoint.id, "delivered", 3)
        assert len(receiver.got) == 3

    play(scenario)


def test_a_restart_keeps_the_pause_before_the_next_attempt(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver(lambda _: 500) as failing, Receiver() as well:
            async with delivering(log, settings_in(tmp_path), SLOW) as webhooks:
                of_failing = await endpoint(webhooks, failing.url)
                await end_job(log, "ftjob-1")

                async def has_failed() -> bool:
                    deliveries = await all_deliveries(webhooks, of_failing.endpoint.id)
                    return bool(deliveries) and deliveries[0].last_error == "answered 500"

                await async_eventually(has_failed, WAIT_S, lambda: "the first attempt does not fail")
                (before,) = await all_deliveries(webhooks, of_failing.endpoint.id)
            async with delivering(log, settings_in(tmp_path), SLOW) as webhooks:
                of_well = await endpoint(webhooks, well.url)
                await end_job(log, "ftjob-2")
                await until_settled(webhooks, of_well.endpoint.id, "delivered")  # so it has looked for what is due
                (_, after) = await all_deliveries(webhooks, of_failing.endpoint.id)
                assert after == before
                assert after.next_attempt_at is not None
                assert 2500 < after.next_attempt_at - time.time() < 4500
        assert [verified(got, of_failing.secret).data.id for got in failing.got] == ["ftjob-1", "ftjob-2"]

    play(scenario)


class Clock:
    """The machine's clock, set forward by `ahead_s`."""

    ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the deliverer reads."""
    clock = Clock()
    monkeypatch.setattr("trainers.webhooks.deliverer.time", clock)
    return clock


def test_a_clock_that_is_set_back_a_day_puts_no_attempt_off_by_a_day(play: Play, tmp_path: Path, clock: Clock) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver(lambda number: 500 if number < 2 else 200) as receiver:
            async with delivering(log, settings_in(tmp_path), SLOW) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                clock.ahead_s = 86400
                for job_id in ("ftjob-1", "ftjob-2"):
                    await end_job(log, job_id)

                async def have_failed() -> bool:
                    deliveries = await all_deliveries(webhooks, created.endpoint.id)
                    return [one.last_error for one in deliveries] == ["answered 500"] * 2

                await async_eventually(have_failed, WAIT_S, lambda: "the first attempts do not fail")
                clock.ahead_s = 0
                await end_job(log, "ftjob-3")
                await until_settled(webhooks, created.endpoint.id, "delivered", 3)

    play(scenario)


def test_a_clock_that_was_set_back_while_nothing_ran_puts_no_attempt_off(
    play: Play, tmp_path: Path, clock: Clock
) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver(lambda number: 500 if number < 1 else 200) as receiver:
            async with delivering(log, settings_in(tmp_path), SLOW) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                clock.ahead_s = 86400
                await end_job(log, "ftjob-1")

                async def has_failed() -> bool:
                    deliveries = await all_deliveries(webhooks, created.endpoint.id)
                    return [one.last_error for one in deliveries] == ["answered 500"]

                await async_eventually(has_failed, WAIT_S, lambda: "the first attempt does not fail")
            clock.ahead_s = 0
            async with delivering(log, settings_in(tmp_path), SLOW) as webhooks:
                await until_settled(webhooks, created.endpoint.id, "delivered")

    play(scenario)


def test_an_event_with_a_time_ahead_of_the_clock_is_delivered_at_once(play: Play, tmp_path: Path, clock: Clock) -> None:
    """The log was written while the clock was ahead, and its time never goes back."""

    async def scenario(log: EventLog) -> None:
        clock.ahead_s = -86400
        with Receiver() as receiver:
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                await end_job(log, "ftjob-1")
                await until_settled(webhooks, created.endpoint.id, "delivered")

    play(scenario)


def test_pauses_grow_to_half_a_day_and_the_attempts_last_three_days() -> None:
    pace = Pace(jitter=0)
    pauses = [pace.pause_s(attempts) for attempts in range(1, pace.attempts)]
    assert pauses[:4] == [5, 15, 45, 135]
    assert pauses[-1] == 12 * 3600
    assert pauses == sorted(pauses)
    assert 2.9 < sum(pauses) / 86400 < 3.3
    jittered = [Pace().pause_s(1) for _ in range(200)]
    assert 4 <= min(jittered) < 4.5 < 5.5 < max(jittered) <= 6


def test_a_delivery_is_given_up_after_its_last_attempt_and_can_be_sent_again(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        pace = Pace(first_pause_s=0.01, growth=1, attempts=3)
        with Receiver(lambda number: 500 if number < 3 else 204) as receiver:
            async with delivering(log, settings_in(tmp_path), pace) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                await end_job(log, "ftjob-1")
                (failed,) = await until_settled(webhooks, created.endpoint.id, "failed")
                assert (failed.attempts, failed.last_status_code, failed.last_error) == (3, 500, "answered 500")
                assert failed.next_attempt_at is None
                again = await webhooks.redeliver(created.endpoint.id, failed.notice.event_id)
                assert (again.status, again.attempts) == ("pending", 0)
                (delivered,) = await until_settled(webhooks, created.endpoint.id, "delivered")
                assert (delivered.last_status_code, delivered.last_error) == (204, None)
        assert {got.headers["webhook-id"] for got in receiver.got} == {failed.notice.event_id}

    play(scenario)


def test_410_disables_the_endpoint_until_it_is_updated(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver(lambda number: 410 if number == 0 else 200) as receiver:
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                other = await endpoint(webhooks, receiver.url, "fine_tuning.job.cancelled")
                await end_job(log, "ftjob-1")
                (failed,) = await until_settled(webhooks, created.endpoint.id, "failed")
                assert (len(receiver.got), failed.last_status_code) == (1, 410)
                assert not (await webhooks.endpoint(created.endpoint.id)).enabled
                with pytest.raises(UserError, match="disabled"):
                    await webhooks.redeliver(created.endpoint.id, failed.notice.event_id)
                await end_job(log, "ftjob-2", "cancelled")
                await until_settled(webhooks, other.endpoint.id, "delivered")  # so the event was seen
                await until_settled(webhooks, created.endpoint.id, "failed")
                assert (await webhooks.update(created.endpoint.id, None, None, None)).enabled
                await webhooks.redeliver(created.endpoint.id, failed.notice.event_id)
                await until_settled(webhooks, created.endpoint.id, "delivered")

    play(scenario)


def test_a_rotated_secret_signs_and_the_old_one_with_it_if_that_was_asked_for(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver() as receiver:
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                first = await endpoint(webhooks, receiver.url)
                second, third = new_secret(), new_secret()
                for _ in range(2):  # a call that is made again takes nothing away
                    await webhooks.rotate(first.endpoint.id, second, keep_old=True)
                await end_job(log, "ftjob-1")
                await until_settled(webhooks, first.endpoint.id, "delivered")
                await webhooks.rotate(first.endpoint.id, third, keep_old=False)
                await end_job(log, "ftjob-2")
                await until_settled(webhooks, first.endpoint.id, "delivered", 2)
        both, last = receiver.got
        assert verified(both, first.secret) == verified(both, second)
        assert verified(last, third).data.id == "ftjob-2"
        with pytest.raises(Exception, match="signature"):
            verified(last, second)

    play(scenario)


def test_nobody_but_the_owner_may_read_the_secrets(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver() as receiver:
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                await end_job(log, "ftjob-1")
                await until_settled(webhooks, created.endpoint.id, "delivered")
                modes.update({path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("webhooks.db*")})  # noqa: ASYNC240  -- a test
                assert created.secret not in repr(await webhooks.endpoints(10, None))
                secrets.append(created.secret.removeprefix("whsec_"))

    modes: dict[str, int] = {}
    secrets: list[str] = []
    play(scenario)
    assert modes.keys() >= {"webhooks.db", "webhooks.db-wal"}
    assert set(modes.values()) == {0o600}
    others = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in modes]
    assert not any(secrets[0].encode() in path.read_bytes() for path in others)
    assert secrets[0].encode() in (tmp_path / "webhooks.db").read_bytes()  # so it would have been found


def test_a_log_that_was_restored_from_a_backup_is_read_again(play: Play, tmp_path: Path) -> None:
    """Its positions belong to other events now. Events that were delivered before are known by their ids."""

    async def scenario(log: EventLog) -> None:
        with Receiver() as receiver:
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                await end_job(log, "ftjob-1")
                await log.backup(str(tmp_path / "backup.db"))
                await end_job(log, "ftjob-lost")
                await until_settled(webhooks, created.endpoint.id, "delivered", 2)
            (tmp_path / "restored").mkdir()
            (tmp_path / "backup.db").rename(tmp_path / "restored" / "events.db")
            restored = log_in(tmp_path / "restored")
            await end_job(restored, "ftjob-2", "rejected")
            async with delivering(restored, settings_in(tmp_path)) as webhooks:
                told = await until_settled(webhooks, created.endpoint.id, "delivered", 3)
            await restored.close()
        assert [one.notice.job_id for one in told] == ["ftjob-2", "ftjob-lost", "ftjob-1"]
        assert len(receiver.got) == 3

    play(scenario)


class CountingLog(EventLog):
    """Counts how often it is read."""

    reads = 0

    async def subscribe(self, after_position: int, limit: int = 1000, wait_s: float = 0) -> list[Recorded]:
        self.reads += 1
        return await super().subscribe(after_position, limit, wait_s)


def test_without_an_endpoint_the_log_is_not_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = CountingLog(MemoryStore())
        async with delivering(log, settings_in(tmp_path)) as webhooks:
            for number in range(10):
                await end_job(log, f"ftjob-{number}")
            assert log.reads == 0
            with Receiver() as receiver:
                created = await endpoint(webhooks, receiver.url)
                await end_job(log, "ftjob-last")
                await until_settled(webhooks, created.endpoint.id, "delivered")
                assert log.reads > 0
        await log.close()

    asyncio.run(scenario())


def test_a_create_that_is_repeated_makes_one_endpoint(play: Play, tmp_path: Path) -> None:
    """Ray makes a call again whose actor died amid it."""

    async def scenario(log: EventLog) -> None:
        async with delivering(log, settings_in(tmp_path)) as webhooks:
            first, again = [await webhooks.create("we_1", "whsec_1", "x", "http://127.0.0.1/", TYPES) for _ in range(2)]
            assert await webhooks.endpoints(10, None) == ([first], False)
            assert again == first

    play(scenario)


def test_a_file_that_cannot_be_opened_is_opened_once_it_can(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        (tmp_path / "webhooks.db").mkdir()
        with Receiver() as receiver:
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                with pytest.raises(WebhooksUnavailable):
                    await webhooks.endpoints(10, None)
                (tmp_path / "webhooks.db").rmdir()
                created = await endpoint(webhooks, receiver.url)
                await end_job(log, "ftjob-1")
                await until_settled(webhooks, created.endpoint.id, "delivered")

    play(scenario)

"""The log and the log queue as actors of a real cluster: a SIGKILL loses nothing, and what callers see of one."""

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

from events.actors import EVENT_LOG, NAMESPACE, Handles, StorageMismatchError, blocking, connect
from events.decide import Refused
from events.facts import CheckpointSaved
from events.ids import new_event_id
from events.log import EventLog, LogUnavailable
from events.store import ExpectedVersionError
from tests.conftest import stop_actors
from tests.events.facts_of_a_job import ADMITTED, CANCEL, SUBMITTED, VALIDATED, started
from tests.events.support import change, numbered, write
from tests.named_actors import EndedWhileLookedUp
from tests.waiting import eventually


async def running_job(handles: Handles, job_id: str) -> None:
    await handles.log.submit(job_id, SUBMITTED, new_event_id(), 100)
    await handles.log.append(job_id, [VALIDATED, ADMITTED, started(1)], [new_event_id() for _ in range(3)])


def test_errors_reach_the_caller_as_themselves(handles: Handles) -> None:
    blocking(handles.log.submit("a", SUBMITTED, new_event_id(), 100))
    with pytest.raises(Refused) as refused:
        blocking(handles.log.job("b"))
    assert (type(refused.value), refused.value.code) == (Refused, "unknown_job")
    with pytest.raises(ExpectedVersionError) as stale:
        blocking(handles.log.append("a", [CANCEL], [new_event_id()], 5))
    assert (stale.value.expected, stale.value.actual) == (5, 0)
    with pytest.raises(ValueError, match="is not a job id"):
        blocking(handles.lines.read("../etc"))


@pytest.mark.usefixtures("handles")
def test_what_an_operator_reads_of_damage_says_when_it_was_seen(tmp_path: Path) -> None:
    stop_actors()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    write(damaged / "events.db")
    change(damaged / "events.db", "UPDATE events SET checksum = 0 WHERE position = 5")
    connect(damaged)
    worker: Any = ray._private.worker
    logs = Path(worker.global_worker.node.get_logs_dir_path())
    line = re.compile(
        r"^[-\d]{10} [:\d]{8},\d{3} ERROR events\.log -- the event at position 5, .* is damaged", re.MULTILINE
    )

    def told() -> bool:
        return any(line.search(file.read_text()) for file in logs.glob("worker-*.err"))

    eventually(told, 60, lambda: f"there is no such line in {logs}")


def test_a_job_is_found_by_its_idempotency_key(handles: Handles) -> None:
    assert blocking(handles.log.job_with_key("k")) is None
    event = SUBMITTED.model_copy(update={"idempotency_key": "k"})
    job = blocking(handles.log.submit("a", event, new_event_id(), 100))
    assert blocking(handles.log.job_with_key("k")) == job


def test_a_log_of_a_version_that_cannot_look_for_a_key_still_makes_one_job_of_it(
    handles: Handles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_actors()
    with monkeypatch.context() as before:
        before.delattr(EventLog, "job_with_key")
        connect(tmp_path)
    log = connect(tmp_path).log
    event = SUBMITTED.model_copy(update={"idempotency_key": "k"})
    for job_id in ("a", "b"):
        assert blocking(log.job_with_key("k")) is None
        assert blocking(log.submit(job_id, event, new_event_id(), 100)).job_id == "a"


def test_a_log_that_ends_while_its_name_is_looked_up_is_not_there_for_the_moment(
    handles: Handles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another() -> ActorHandle[Any]:
        connect(tmp_path)
        return ray.get_actor(EVENT_LOG, NAMESPACE)

    stop_actors()
    with monkeypatch.context() as meanwhile:
        race = EndedWhileLookedUp(meanwhile, another, EVENT_LOG)
        with pytest.raises(LogUnavailable, match=EVENT_LOG):
            connect(tmp_path)
        assert race.looks == 3
    assert blocking(connect(tmp_path).log.job_with_key("k")) is None


def test_everyone_who_connects_gets_the_same_log(handles: Handles, tmp_path: Path) -> None:
    blocking(handles.log.submit("a", SUBMITTED, new_event_id(), 100))
    assert blocking(connect(tmp_path).log.job("a")).job_id == "a"

    @ray.remote(num_cpus=0)
    def status(carried: Handles) -> str:
        return blocking(carried.log.job("a")).status

    assert ray.get(status.remote(handles)) == "validation"


def test_another_storage_directory_is_refused(handles: Handles, tmp_path: Path) -> None:
    with pytest.raises(StorageMismatchError, match=str(tmp_path)):
        connect(tmp_path / "other")


def test_a_long_poll_ends_when_there_is_news_and_holds_up_nobody(handles: Handles) -> None:
    async def scenario() -> None:
        await handles.log.submit("a", SUBMITTED, new_event_id(), 100)
        polls = [asyncio.create_task(handles.log.wait("a", 0, 600)) for _ in range(50)]
        tails = [asyncio.create_task(handles.lines.read("a", 0, wait_s=600)) for _ in range(50)]
        await handles.log.append("a", [VALIDATED], [new_event_id()])
        await handles.lines.append("a", "rank-0", 0, numbered(0, 1))
        assert {job.status for job in await asyncio.gather(*polls)} == {"queued"}
        assert {batch.next for batch in await asyncio.gather(*tails)} == {1}

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_jobs_that_are_asked_for_at_the_same_time_come_each_to_who_asked_and_as_new_as_the_question(
    handles: Handles,
) -> None:
    async def scenario() -> None:
        for job_id in "abc":
            await handles.log.submit(job_id, SUBMITTED, new_event_id(), 100)
        asked = [*"abcabcab", "nobody's"]
        found = await asyncio.gather(*map(handles.log.job_json, asked), return_exceptions=True)
        assert [json.loads(answer)["job_id"] for answer in found[:-1] if isinstance(answer, bytes)] == asked[:-1]
        assert isinstance(found[-1], Refused)
        earlier = asyncio.create_task(handles.log.job_json("a"))
        await asyncio.sleep(0)  # its question is under way
        await handles.log.append("a", [CANCEL], [new_event_id()])
        assert json.loads(await handles.log.job_json("a"))["cancel_requested"]
        await earlier
        waiting = [asyncio.create_task(handles.log.job_json("a")) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # its client has gone
        assert json.loads(await waiting[1])["cancel_requested"]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_killing_the_log_loses_no_acknowledged_event_and_repeats_none(handles: Handles) -> None:
    async def scenario() -> None:
        await running_job(handles, "a")
        acknowledged: list[str] = []
        under_way = asyncio.Event()

        async def write(writer: int) -> None:
            for number in range(60):
                event = CheckpointSaved(attempt=1, step=number, epoch=0, uri=f"file:///{writer}-{number}")
                await handles.log.append("a", [event], [new_event_id()])
                acknowledged.append(event.uri)
                if len(acknowledged) == 40:
                    under_way.set()

        writers = [asyncio.create_task(write(writer)) for writer in range(4)]
        await under_way.wait()
        victim = await handles.log.about()
        os.kill(victim.pid, signal.SIGKILL)
        await asyncio.gather(*writers)
        assert (await handles.log.about()).pid != victim.pid
        history = await handles.log.read("a")
        written = [one.event.uri for one in history if isinstance(one.event, CheckpointSaved)]
        assert sorted(written) == sorted(acknowledged)
        assert (await handles.log.job("a")).version == 3 + 240

    asyncio.run(scenario())


def test_killing_the_queue_loses_and_repeats_no_line(handles: Handles) -> None:
    async def scenario() -> None:
        async def write() -> None:
            for first in range(0, 4000, 20):
                await handles.lines.append("a", "rank-0", first, numbered(first, 20))

        async def follow() -> list[str]:
            after, messages = 0, list[str]()
            while len(messages) < 4000:
                batch = await handles.lines.read("a", after, wait_s=10)
                messages += [line["message"] for line in batch.lines]
                after = batch.next
            return messages

        writer, follower = asyncio.create_task(write()), asyncio.create_task(follow())
        while (await handles.lines.read("a", 400, 1, wait_s=5)).lines == []:
            pass
        victim = await handles.lines.about()
        os.kill(victim.pid, signal.SIGKILL)
        await writer
        assert await follower == [f"line {number}" for number in range(4000)]
        assert (await handles.lines.about()).pid != victim.pid

    asyncio.run(scenario())


def test_an_actor_that_was_ended_for_good_is_reported_and_then_replaced(handles: Handles) -> None:
    blocking(handles.log.submit("a", SUBMITTED, new_event_id(), 100))
    ray.kill(ray.get_actor(EVENT_LOG, NAMESPACE))

    def ask_until_it_is_noticed() -> None:
        while True:
            blocking(handles.log.job("a"))

    with pytest.raises(LogUnavailable):
        ask_until_it_is_noticed()
    assert blocking(handles.log.job("a")).status == "validation"


def test_an_actor_that_gives_no_answer_in_time_is_reported_with_that(
    handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("events.actors.CALL_TIMEOUT_S", 0.0)
    with pytest.raises(LogUnavailable, match=f"^{EVENT_LOG} does not answer: no answer in time$"):
        blocking(handles.log.job("a"))

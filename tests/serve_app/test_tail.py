"""GET /fine_tuning/jobs/tail: every line once, in order, whenever and however often one reads."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from events.facts import CancelRequested, JobCancelled
from events.job import FineTuningJob
from events.log import LogUnavailable
from events.log_queue import LogBatch
from serve_app import tail as tail_module
from serve_app.tail import Together
from tests.events.facts_of_a_job import WORKER_DIED
from tests.serve_app.live_server import Serve, Server
from tests.waiting import eventually

TAIL = "/fine_tuning/jobs/tail"
Submit = Callable[..., str]


def lines(http: httpx.Client, job_id: str, **query: Any) -> Generator[dict[str, Any], None, None]:
    """The stream's lines as they come. Closing it closes the connection."""
    with http.stream("GET", TAIL, params={"job_id": job_id, **query}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert answer.headers["transfer-encoding"] == "chunked"
        yield from (json.loads(line) for line in answer.iter_lines())


def messages(stream: Iterator[dict[str, Any]]) -> list[str]:
    return [log["message"] for line in stream for log in line["logs"]]


def test_what_was_printed_before_is_replayed_and_what_comes_is_followed(
    http: httpx.Client, server: Server, submit: Submit
) -> None:
    job_id = submit()
    server.print(job_id, "one", "two")
    stream = lines(http, job_id)
    first = next(stream)
    assert [log["message"] for log in first["logs"]] == ["one", "two"]
    assert first["logs"][0]["timestamp"] == "2026-01-02T03:04:05.678Z"
    assert first["next"] == 2
    server.print(job_id, "three", seq=2)
    assert next(line for line in stream if line["logs"]) == {
        "logs": [{"message": "three", "timestamp": "2026-01-02T03:04:05.678Z"}],
        "next": 3,
    }
    server.append(job_id, WORKER_DIED)
    *_, last = stream
    assert last == {"logs": [], "next": 3, "status": "failed"}


def test_a_tail_may_begin_before_the_job_prints_and_sees_its_first_line(
    http: httpx.Client, server: Server, submit: Submit
) -> None:
    job_id = submit()
    stream = lines(http, job_id)
    assert next(stream) == {"logs": [], "next": 0}
    server.print(job_id, "first")
    assert next(line for line in stream if line["logs"])["next"] == 1
    stream.close()


def test_a_message_with_line_ends_of_unicode_is_in_one_line(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    message = "a\u2028b\u2029c\x85d\x0be\x1ef, täglich"
    server.print(job_id, message)
    assert messages(lines(http, job_id, follow=False)) == [message]


def test_a_job_that_has_ended_is_replayed_to_its_end(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    server.print(job_id, *(str(number) for number in range(1234)))
    server.append(job_id, CancelRequested(), JobCancelled())
    stream = list(lines(http, job_id))
    assert messages(iter(stream)) == [str(number) for number in range(1234)]
    assert all(len(line["logs"]) <= tail_module.BATCH_LINES for line in stream)
    assert [line.get("status") for line in stream] == [None] * (len(stream) - 1) + ["cancelled"]


def test_a_reader_that_reconnects_with_next_loses_and_repeats_nothing(
    http: httpx.Client, server: Server, submit: Submit
) -> None:
    job_id = submit()
    seen: list[str] = []
    after = 0
    for round_ in range(5):
        server.print(job_id, f"{round_}a", f"{round_}b", seq=2 * round_)
        stream = lines(http, job_id, after=after)
        line = next(line for line in stream if line["logs"])
        stream.close()
        seen += [log["message"] for log in line["logs"]]
        after = line["next"]
    assert seen == [f"{round_}{half}" for round_ in range(5) for half in "ab"]


def test_without_follow_the_stream_ends_with_what_is_there(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    assert list(lines(http, job_id, follow=False)) == [{"logs": [], "next": 0}]
    server.print(job_id, "one")
    stream = list(lines(http, job_id, follow="false"))
    assert messages(iter(stream)) == ["one"]
    assert stream[-1] == {"logs": [], "next": 1}


def test_an_offset_beyond_the_end_means_the_end(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    server.print(job_id, "one")
    assert list(lines(http, job_id, follow=False, after=99)) == [{"logs": [], "next": 1}]


def test_an_idle_stream_gets_an_empty_line_at_least_every_heartbeat(http: httpx.Client, submit: Submit) -> None:
    stream = lines(http, submit())
    next(stream)
    gaps = []
    for _ in range(5):
        before = time.monotonic()
        assert next(stream)["logs"] == []
        gaps.append(time.monotonic() - before)
    stream.close()
    assert sorted(gaps)[2] < 0.5  # the median: a machine that others use is late now and then


def test_the_end_of_a_silent_job_ends_the_stream_at_once(http: httpx.Client, server: Server, submit: Submit) -> None:
    delays = []
    for _ in range(5):
        job_id = submit()
        stream = lines(http, job_id)
        next(stream)
        server.append(job_id, WORKER_DIED)
        before = time.monotonic()
        *_, last = stream
        assert last["status"] == "failed"
        delays.append(time.monotonic() - before)
    assert sorted(delays)[2] < 0.4  # before it is time for a heartbeat


def test_many_readers_each_get_every_line(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    with ThreadPoolExecutor(20) as pool, httpx.Client(base_url=server.url, limits=httpx.Limits()) as client:
        readers = [pool.submit(lambda: messages(lines(client, job_id))) for _ in range(20)]
        for number in range(50):
            server.print(job_id, str(number), seq=number)
        server.append(job_id, WORKER_DIED)
        for reader in readers:
            assert reader.result(timeout=60) == [str(number) for number in range(50)]


def test_a_reader_that_does_not_read_holds_up_nobody_and_is_not_read_ahead_for(
    server: Server, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    asked: list[int] = []
    read = server.parts.logs.read

    async def counted(job_id: str, after: int = 0, limit: int = 1000, wait_s: float = 0) -> LogBatch:
        asked.append(after)
        return await read(job_id, after, limit, wait_s)

    server.print(job_id, *("x" * 1000 for _ in range(50_000)))
    server.append(job_id, WORKER_DIED)
    monkeypatch.setattr(server.parts.logs, "read", counted)
    with httpx.Client(base_url=server.url) as slow, slow.stream("GET", TAIL, params={"job_id": job_id}) as answer:
        assert answer.status_code == 200
        until_quiet(asked)
        # 50 MB are there; only what fits into the buffers of two sockets has been asked for.
        assert max(asked) < 25_000
        assert httpx.get(server.url + "/healthz").status_code == 200


def test_readers_at_the_same_place_share_one_read_which_ends_when_the_last_of_them_leaves() -> None:
    async def scenario() -> None:
        together, answer = Together(), asyncio.Event()
        asked = ended = 0

        async def ask() -> str:
            nonlocal asked, ended
            asked += 1
            try:
                await answer.wait()
            finally:
                ended += 1
            return "line"

        async def until_asked(times: int) -> None:
            while asked < times:  # noqa: ASYNC110  -- one turn of the loop or two
                await asyncio.sleep(0)

        first, *others = [asyncio.create_task(together.ask("place", ask)) for _ in range(3)]
        await until_asked(1)
        first.cancel()
        await asyncio.wait([first])
        answer.set()
        assert await asyncio.gather(*others) == ["line", "line"]
        assert (asked, ended) == (1, 1)
        assert await together.ask("place", ask) == "line"  # who comes after an answer asks anew
        assert asked == 2

        answer.clear()
        alone = asyncio.create_task(together.ask("place", ask))
        await until_asked(3)
        alone.cancel()
        await asyncio.wait([alone])
        while ended < 3:  # noqa: ASYNC110  -- as above
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_read_that_ends_a_stream_is_not_shared_for_lines_may_have_come_since_the_other_began() -> None:
    async def scenario() -> None:
        asked = 0

        async def read(*_: object) -> LogBatch:
            nonlocal asked
            asked += 1
            while asked < 2:  # noqa: ASYNC110  -- answered once the other one is asked too
                await asyncio.sleep(0)
            return LogBatch([], 0)

        backend: Any = SimpleNamespace(logs=SimpleNamespace(read=read))
        job = FineTuningJob(job_id="a", created=datetime.now(UTC), status="success", input_config={})
        together = Together()
        options: dict[str, Any] = {"after": 0, "follow": True, "heartbeat_s": 20, "closing": asyncio.Event()}

        async def lines_of_a_reader() -> list[Any]:
            return [json.loads(line) async for line in tail_module.tail(backend, job, together, **options)]

        end = {"logs": [], "next": 0, "status": "success"}
        one, other = await asyncio.gather(lines_of_a_reader(), lines_of_a_reader())
        assert one == other == [end]

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_question_that_fails_fails_for_all_who_asked_it() -> None:
    async def scenario() -> None:
        together = Together()

        async def fail() -> None:
            await asyncio.sleep(0)
            raise LogUnavailable("gone")

        outcomes = await asyncio.gather(*(together.ask("place", fail) for _ in range(3)), return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["gone"] * 3

    asyncio.run(scenario())


def until_quiet(asked: list[int]) -> None:
    """Returns once nothing was asked for during a fifth of a second."""
    count = -1
    while count != len(asked):
        count = len(asked)
        time.sleep(0.2)


def test_a_reader_that_goes_away_ends_its_work(server: Server, submit: Submit) -> None:
    job_id = submit()
    waiting = server.parts.log._bell._waiting
    with httpx.Client(base_url=server.url) as client:
        stream = lines(client, job_id)
        next(stream)
        assert job_id in waiting
        stream.close()
    eventually(lambda: job_id not in waiting, 30, lambda: "somebody still waits for the job")


def test_lines_arrive_within_milliseconds(http: httpx.Client, server: Server, submit: Submit) -> None:
    job_id = submit()
    stream = lines(http, job_id)
    next(stream)
    delays = []
    for number in range(20):
        threading.Timer(0, server.print, (job_id, str(number)), {"seq": number}).start()
        before = time.monotonic()
        while not next(stream)["logs"]:
            pass
        delays.append(time.monotonic() - before)
    stream.close()
    assert sorted(delays)[10] < 0.2


def test_before_its_server_ends_an_open_stream_gets_a_last_line_with_its_offset(serve: Serve) -> None:
    server = serve(heartbeat_s=60)
    with httpx.Client(base_url=server.url, timeout=20) as client:
        job_id = server.submit()
        server.print(job_id, "one", "two")
        idle, over = lines(client, job_id), lines(client, job_id, follow=False)
        next(idle)
        server.close_tails()
        assert list(idle) == [{"logs": [], "next": 2}]
        assert messages(over) == ["one", "two"]  # what ends by itself is not cut short
        late = list(lines(client, job_id, after=1))
        assert late[-1] == {"logs": [], "next": 1 + len(messages(iter(late)))}
        server.append(job_id, WORKER_DIED)
        *_, last = lines(client, job_id, after=1)
        assert last == {"logs": [], "next": 2, "status": "failed"}


def test_a_head_of_a_tail_has_an_end(http: httpx.Client, submit: Submit) -> None:
    answer = http.head(f"/fine_tuning/jobs/tail?job_id={submit()}", timeout=10)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")

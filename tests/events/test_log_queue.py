"""`LogQueue` as a plain class: readers, windows, waiting."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from events.log_queue import WINDOW_LINES, LogQueue
from tests.events.support import TIME, numbered


async def read_to_end(queue: LogQueue, job_id: str, after: int = 0, limit: int = 1000) -> list[str]:
    messages: list[str] = []
    while (batch := await queue.read(job_id, after, limit)).lines:
        messages += [line["message"] for line in batch.lines]
        assert batch.next == after + len(batch.lines)
        after = batch.next
    return messages


def with_queue(storage: Path, scenario: Callable[[LogQueue], Awaitable[None]], **options: float) -> None:
    async def run() -> None:
        queue = LogQueue(storage, **options)
        try:
            await scenario(queue)
        finally:
            await queue.close()

    asyncio.run(run())


def expected(count: int) -> list[str]:
    return [f"line {number}" for number in range(count)]


def test_any_number_of_readers_each_read_every_line(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        await queue.append("a", "rank-0", 0, numbered(0, 100))
        assert await read_to_end(queue, "a") == expected(100)
        assert await read_to_end(queue, "a", limit=7) == expected(100)
        assert await read_to_end(queue, "a", after=90) == expected(100)[90:]

    with_queue(tmp_path, scenario)


def test_lines_older_than_the_window_come_from_the_disk_without_a_seam(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        total = 3 * WINDOW_LINES
        for first in range(0, total, 100):
            await queue.append("a", "rank-0", first, numbered(first, 100))
        assert await read_to_end(queue, "a", limit=333) == expected(total)

    with_queue(tmp_path, scenario)


def test_a_few_huge_lines_do_not_stay_in_memory(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        huge = [(TIME, "x" * 16_000) for _ in range(100)]
        await queue.append("a", "rank-0", 0, huge)
        assert len((await queue.read("a", 0)).lines) < 100  # a read is bounded too
        assert await read_to_end(queue, "a") == [message for _, message in huge]

    with_queue(tmp_path, scenario)


def test_everything_reads_again_after_a_restart_and_retried_lines_are_there_once(tmp_path: Path) -> None:
    async def before(queue: LogQueue) -> None:
        assert await queue.append("a", "rank-0", 0, numbered(0, 50)) == 50

    async def after(queue: LogQueue) -> None:
        assert await read_to_end(queue, "a") == expected(50)
        assert await queue.append("a", "rank-0", 40, numbered(40, 20)) == 60
        assert await read_to_end(queue, "a") == expected(60)

    with_queue(tmp_path, before)
    with_queue(tmp_path, after)


def test_a_waiting_reader_gets_the_lines_as_they_come(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        waiting = [asyncio.create_task(queue.read("a", 0, wait_s=600)) for _ in range(5)]
        await asyncio.sleep(0)
        await queue.append("a", "rank-0", 0, numbered(0, 2))
        for batch in await asyncio.wait_for(asyncio.gather(*waiting), 60):
            assert ([line["message"] for line in batch.lines], batch.next) == (expected(2), 2)

    with_queue(tmp_path, scenario)


def test_a_follower_loses_and_repeats_nothing_while_lines_come_in(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        async def follow() -> list[str]:
            after, messages = 0, list[str]()
            while len(messages) < 3000:
                batch = await queue.read("a", after, limit=64, wait_s=600)
                messages += [line["message"] for line in batch.lines]
                after = batch.next
            return messages

        followers = [asyncio.create_task(follow()) for _ in range(3)]
        for first in range(0, 3000, 50):
            await queue.append("a", "rank-0", first, numbered(first, 50))
        for messages in await asyncio.wait_for(asyncio.gather(*followers), 60):
            assert messages == expected(3000)

    with_queue(tmp_path, scenario)


def test_waking_lets_waiting_readers_return_empty(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        await queue.append("a", "rank-0", 0, numbered(0, 1))
        waiting = asyncio.create_task(queue.read("a", 1, wait_s=600))
        await asyncio.sleep(0)
        await queue.wake("a")
        assert await asyncio.wait_for(waiting, 60) == ([], 1)

    with_queue(tmp_path, scenario)


def test_a_read_returns_empty_when_time_is_up(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        await queue.append("a", "rank-0", 0, numbered(0, 1))
        assert await queue.read("a", 1, wait_s=0.01) == ([], 1)

    with_queue(tmp_path, scenario)


def test_an_unknown_job_reads_as_empty_and_leaves_no_trace(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        assert await queue.read("nobody") == ([], 0)
        assert await queue.read("nobody", 7, wait_s=0.01) == ([], 0)

    with_queue(tmp_path, scenario)
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize("after", [2, 1000])
def test_beyond_the_end_means_at_the_end(tmp_path: Path, after: int) -> None:
    async def scenario(queue: LogQueue) -> None:
        await queue.append("a", "rank-0", 0, numbered(0, 2))
        assert await queue.read("a", after) == ([], 2)

    with_queue(tmp_path, scenario)


@pytest.mark.parametrize("job_id", ["", "..", "../b", "a/b", "a\0", "a\n", ".hidden", "x" * 200])
def test_a_job_id_that_is_no_plain_name_is_refused(tmp_path: Path, job_id: str) -> None:
    async def scenario(queue: LogQueue) -> None:
        with pytest.raises(ValueError, match="is not a job id"):
            await queue.append(job_id, "rank-0", 0, numbered(0, 1))
        with pytest.raises(ValueError, match="is not a job id"):
            await queue.read(job_id)

    with_queue(tmp_path, scenario)
    assert list(tmp_path.iterdir()) == []


def test_concurrent_writers_keep_their_own_order(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        async def write(source: str) -> None:
            for seq in range(0, 100, 10):
                await queue.append("a", source, seq, [(TIME, f"{source} {seq + number}") for number in range(10)])

        sources = [f"rank-{rank}" for rank in range(4)]
        await asyncio.gather(*map(write, sources))
        messages = await read_to_end(queue, "a")
        for source in sources:
            mine = [message for message in messages if message.startswith(source)]
            assert mine == [f"{source} {number}" for number in range(100)]

    with_queue(tmp_path, scenario)


def test_an_idle_job_leaves_memory_and_comes_back_from_disk(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        await queue.append("a", "rank-0", 0, numbered(0, 10))
        await queue.append("b", "rank-0", 0, numbered(0, 1))
        shutil.move(tmp_path / "jobs" / "a", tmp_path / "elsewhere")
        assert await queue.read("a") == ([], 0)  # no longer in memory: the disk is asked
        shutil.move(tmp_path / "elsewhere", tmp_path / "jobs" / "a")
        assert await read_to_end(queue, "a") == expected(10)
        assert await queue.append("a", "rank-0", 5, numbered(5, 10)) == 15

    with_queue(tmp_path, scenario, idle_s=0.0)


def test_lines_that_could_not_be_written_can_be_sent_again(tmp_path: Path) -> None:
    async def scenario(queue: LogQueue) -> None:
        await queue.append("a", "rank-0", 0, numbered(0, 5))
        log = tmp_path / "jobs" / "a" / "log.ndjson"
        log.rename(log.with_suffix(".aside"))
        log.mkdir()  # a write to it fails in the kernel
        with pytest.raises(OSError, match="directory"):
            await queue.append("a", "rank-0", 5, numbered(5, 5))
        log.rmdir()
        log.with_suffix(".aside").rename(log)
        assert await queue.append("a", "rank-0", 5, numbered(5, 5)) == 10
        assert await read_to_end(queue, "a") == expected(10)

    with_queue(tmp_path, scenario)


def test_a_log_file_with_a_hole_is_read_to_its_end(tmp_path: Path) -> None:
    async def before(queue: LogQueue) -> None:
        for first in range(0, 3000, 100):
            await queue.append("a", "rank-0", first, numbered(first, 100))

    async def after(queue: LogQueue) -> None:
        messages, offset = list[str](), 0
        while (batch := await queue.read("a", offset, limit=500)).lines:
            messages += [line["message"] for line in batch.lines]
            offset = batch.next
        assert offset == 3000
        assert "lines of the log are lost" in messages[0]
        assert messages[1:] == expected(3000)[-len(messages) + 1 :]

    with_queue(tmp_path, before)
    file = tmp_path / "jobs" / "a" / "log.ndjson"
    file.write_bytes(b"\0" * 4096 + file.read_bytes()[4096:])
    with_queue(tmp_path, after)

"""A job's output: every line arrives once, also while the log queue comes and goes."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import JobID
from ray._private import worker

from events.actors import blocking
from events.log import LogUnavailable
from events.log_queue import LogBatch, LogQueue
from trainers import retrying
from trainers.running import job_output
from trainers.running.job_output import JobOutput, LineWriter, leave_the_raylet_out

JOB = "ftjob-1"


class Lines:
    """A log queue whose calls fail, before or after they did their work, as a restarting actor's do."""

    def __init__(self, storage: Path) -> None:
        self.queue = LogQueue(storage)
        self.fails_after_append = False
        self.unavailable = False
        self.unreadable = threading.Event()
        self.refused = threading.Event()
        self.second_line_awaited = threading.Event()

    async def append(self, job_id: str, source: str, seq: int, lines: Sequence[tuple[str, str]]) -> int:
        written = await self.queue.append(job_id, source, seq, lines)
        if self.fails_after_append:
            raise LogUnavailable("no answer in time")
        return written

    async def read(self, job_id: str, after: int = 0, limit: int = 1000, wait_s: float = 0) -> LogBatch:
        if self.unavailable:
            raise LogUnavailable("restarting")
        if self.unreadable.is_set():
            self.refused.set()
            raise OSError("Input/output error")
        if after == 1:
            self.second_line_awaited.set()
        return await self.queue.read(job_id, after, limit, wait_s)

    async def wake(self, job_id: str) -> None:
        if self.unavailable:
            raise LogUnavailable("restarting")
        await self.queue.wake(job_id)

    def messages(self) -> list[str]:
        return [line["message"] for line in blocking(self.queue.read(JOB)).lines]


@pytest.fixture
def lines(tmp_path: Path) -> Any:
    return Lines(tmp_path)


def test_lines_behind_a_batch_that_was_not_acknowledged_are_not_taken_for_it(
    lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "GIVE_UP_AFTER_S", 0)
    write = LineWriter(lines, JOB)
    lines.fails_after_append = True
    with pytest.raises(LogUnavailable):
        write([("t", "one"), ("t", "two")])
    lines.fails_after_append = False
    write([("t", "three")])
    assert lines.messages() == ["one", "two", "three"]


def test_a_log_queue_that_is_gone_at_the_end_does_not_take_the_outcome_with_it(
    lines: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_output, "ECHO_WAIT_S", 0.01)
    with JobOutput(lines, JOB):
        os.write(1, b"trained\n")
        lines.unavailable = True
    assert lines.messages() == ["trained"]


def test_a_log_that_can_not_be_read_for_a_while_is_echoed_again_afterwards(
    lines: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_output, "ECHO_WAIT_S", 0.01)
    with JobOutput(lines, JOB):
        lines.unreadable.set()
        assert lines.refused.wait(10)
        os.write(1, b"trained\n")
        lines.unreadable.clear()
    assert lines.messages() == ["trained"]
    assert capfd.readouterr().out == "trained\n"


@contextlib.contextmanager
def stdout_into(fifo: Path) -> Iterator[None]:
    """This process's stdout takes nothing while nobody has `fifo` open to read."""
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # whoever opens it to write waits for one
    stdout, writer = os.dup(1), os.open(fifo, os.O_WRONLY)
    os.close(reader)
    os.dup2(writer, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(writer)
        os.close(stdout)


def test_lines_that_their_copy_does_not_take_are_in_the_log_and_those_that_follow_are_copied_again(
    lines: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with stdout_into(tmp_path / "fifo"):
        with JobOutput(lines, JOB):
            os.write(1, b"one\n")
            assert lines.second_line_awaited.wait(10)  # the copy of the first was lost
            reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
            os.write(1, b"two\n")
        assert os.read(reader, 100) == b"two\n"
        os.close(reader)
    assert lines.messages() == ["one", "two"]


class _Told:
    """What Ray's control store tells a driver: one warning of a raylet, and then that it is gone."""

    def __init__(self) -> None:
        self.warnings = [{"job_id": None, "error_message": "WARNING: 8 PYTHON worker processes"}]

    def subscribe(self) -> None:
        pass

    def poll(self) -> tuple[None, dict[str, Any]]:
        if not self.warnings:
            raise ConnectionError
        return None, self.warnings.pop()


def test_what_ray_says_of_its_nodes_is_no_part_of_the_jobs_log(
    lines: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    leave_the_raylet_out()
    driver: Any = SimpleNamespace(gcs_error_subscriber=_Told(), current_job_id=JobID.nil())
    with JobOutput(lines, JOB):
        os.write(1, b"trained\n")
        worker.listen_error_messages(driver, threading.Event())
    assert not [message for message in lines.messages() if "WARNING" in message]
    assert "(raylet) WARNING: 8 PYTHON worker processes\n" in capfd.readouterr().out

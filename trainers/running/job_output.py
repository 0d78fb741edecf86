"""Sends the output of a job's processes to the job's log, and echoes that log in the runner.

The runner's standard output is the Ray Job's log, so `ray job logs` and the dashboard's Jobs page show the output of
every worker.
"""

import contextlib
import logging
import os
import sys
import threading
from types import TracebackType
from typing import Any

from ray._private import worker

from events.actors import LogQueueClient, blocking
from events.ids import new_event_id
from events.log import LogUnavailable
from trainers.replacing import replace
from trainers.retrying import retrying
from trainers.running.output import Line, OutputCapture, write_or_lose

ECHO_LINES = 1000
ECHO_WAIT_S = 1.0


class LineWriter:
    """Writes captured lines to the job's log, each once. Lines of ranks other than 0 begin with their rank.

    After an error it is unknown whether the lines were written. Later lines are not affected.
    """

    def __init__(self, queue: LogQueueClient, job_id: str, rank: int = 0) -> None:
        self._lines = queue
        self._job_id = job_id
        self._source = new_event_id()  # one for each process
        self._prefix = f"[rank {rank}] " if rank else ""
        self._written = 0

    def __call__(self, lines: list[Line]) -> None:
        if self._prefix:
            lines = [(timestamp, self._prefix + message) for timestamp, message in lines]
        first = self._written
        self._written += len(lines)  # before the append: after an error, its lines may be in the log
        retrying(lambda: self._lines.append(self._job_id, self._source, first, lines))


class JobOutput:
    """While entered, this process's output goes to the job's log, and all lines of that log are echoed to stdout.

    On exit, everything printed is in the job's log and was echoed, unless the log queue or its storage is gone, or
    stdout takes no more.
    """

    def __init__(self, queue: LogQueueClient, job_id: str) -> None:
        self._lines = queue
        self._job_id = job_id
        self._closing = threading.Event()

    def __enter__(self) -> None:
        self._stdout = os.dup(1)
        self._capture = OutputCapture(LineWriter(self._lines, self._job_id))
        log_to_stdout()
        self._echo = threading.Thread(target=self._echo_lines, name="echo", daemon=True)
        self._echo.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.close()
        self._closing.set()
        with contextlib.suppress(LogUnavailable):  # it only shortens the echo's wait
            blocking(self._lines.wake(self._job_id))
        self._echo.join()
        os.close(self._stdout)

    def _echo_lines(self) -> None:
        offset = 0
        while True:
            closing = self._closing.is_set()
            try:
                batch = blocking(self._lines.read(self._job_id, offset, ECHO_LINES, 0 if closing else ECHO_WAIT_S))
            except (LogUnavailable, OSError):  # the queue is away, or its storage
                # Nothing is lost: this is only a copy for people.
                self._closing.wait(ECHO_WAIT_S)
                if closing:
                    return
                continue
            if batch.lines:
                text = "".join(f"{line['message']}\n" for line in batch.lines)
                write_or_lose(self._stdout, text.encode(errors="backslashreplace"))
            elif closing:
                return
            offset = batch.next


def log_to_stdout() -> None:
    """Sends Tunewright's own log lines to stdout, without a prefix. Libraries' warnings and errors go to stderr."""
    ours = logging.getLogger("tunewright")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.handlers = [handler]
    # On import it warns about compiled kernels, which are not used here. The warning would alarm users.
    logging.getLogger("torchao").setLevel(logging.ERROR)


def leave_the_raylet_out() -> None:
    """Keeps Ray's messages about nodes, which Ray prints in every driver, out of the job's log: they go to the Ray
    Job's log only, for the cluster's operator. To be called before the output is captured."""
    stdout = os.dup(1)

    def printed(data: dict[str, Any], ignore_prefix: bool) -> None:
        text = "".join(f"(raylet) {line}\n" for line in data["lines"])
        write_or_lose(stdout, text.encode(errors="backslashreplace"))

    replace(worker, "print_to_stdstream", printed)

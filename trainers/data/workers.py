"""Processes that encode chunks of lines side by side: most of that work is Python, which one process runs on one core.

They are fresh interpreters, not forks: a fork of a process with threads, as a runner is, may hang. Each speaks pickle
over its standard input and output, and ends when its input does, so it never outlives whoever started it.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import IO, cast

from trainers.data.chat import ChatTokenizer
from trainers.data.encode import Chunk, Line, encode_lines
from trainers.errors import InfrastructureError

_LONG_BYTES = 1 << 18
"""Longer chunks than this (of one row, as `prepare` makes them) are encoded here, one at a time: tokenising takes some
136 bytes of memory for each byte of text."""
_MAX_PROCESSES = 6  # of up to 150 MB each


def usable_cores() -> int:
    """Cores that this process may run on, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_in_parallel(
    chunks: Iterable[Sequence[Line]], tokenizer: ChatTokenizer, max_seq_len: int, pairs: bool = False
) -> Generator[Chunk, None, None]:
    """`encode_lines` of every chunk, in order. Takes only so many chunks ahead as keep the processes busy. They end
    with it, also where it is closed early.

    Raises InfrastructureError `tokenising_failed` where one of them dies.
    """
    count = min(usable_cores(), _MAX_PROCESSES)
    pool = _Pool(count, tokenizer, max_seq_len, pairs)
    ahead: deque[Future[Chunk]] = deque()
    try:
        for lines in chunks:
            if sum(len(raw) for _, raw in lines) > _LONG_BYTES:
                done: Future[Chunk] = Future()
                done.set_result(encode_lines(tokenizer, max_seq_len, lines, pairs))
                ahead.append(done)
            else:
                ahead.append(pool.submit(lines))
            while len(ahead) > 2 * count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.close()


class _Pool:
    def __init__(self, count: int, tokenizer: ChatTokenizer, max_seq_len: int, pairs: bool) -> None:
        self._setup = pickle.dumps((tokenizer, max_seq_len, pairs))
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tokenise")
        self._started: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def submit(self, lines: Sequence[Line]) -> Future[Chunk]:
        return self._threads.submit(self._encode, lines)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._started:
            worker.process.kill()
        self._threads.shutdown()
        for worker in self._started:
            with suppress(BrokenPipeError), worker.process:  # waits for it, and closes the pipes
                pass

    def _encode(self, lines: Sequence[Line]) -> Chunk:
        """On a thread, which waits for a process; a process is started where none is idle."""
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = self._start()
        try:
            chunk = worker.encode(lines)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise InfrastructureError(
                "tokenising_failed",
                f"the process that tokenised lines {lines[0][0]} to {lines[-1][0]} ended with {worker.process.wait()}",
                suggestion="submit the job again; if it fails there again, look at these lines",
            ) from None
        self._idle.put(worker)
        return chunk

    def _start(self) -> "_Worker":
        worker = _Worker()
        self._started.append(worker)
        worker.send(self._setup)
        return worker


class _Worker:
    """A process that runs `main`."""

    def __init__(self) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._requests, self._answers = cast("IO[bytes]", self.process.stdin), cast("IO[bytes]", self.process.stdout)

    def send(self, message: bytes) -> None:
        self._requests.write(message)
        self._requests.flush()

    def encode(self, lines: Sequence[Line]) -> Chunk:
        self.send(pickle.dumps(lines))
        return cast("Chunk", pickle.load(self._answers))  # noqa: S301  -- our own process


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the one who started it
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    with suppress(EOFError, BrokenPipeError):
        tokenizer, max_seq_len, pairs = pickle.load(requests)  # noqa: S301  -- from `_Pool`
        while True:
            chunk = encode_lines(tokenizer, max_seq_len, pickle.load(requests), pairs)  # noqa: S301  -- from `_Pool`
            answers.write(pickle.dumps(chunk))
            answers.flush()


if __name__ == "__main__":
    main()

"""Processes that encode chunks of lines in parallel: most of the work is Python code, which uses one core per process.

They are new interpreters, not forks: a fork of a process with threads, such as a runner, may hang. Each exchanges
pickles over its standard input and output, and ends when its input is closed, so it never outlives its parent.
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
"""Chunks with more bytes (`prepare` makes them of one row) are encoded in this process, one at a time, as tokenising
takes about 136 bytes of memory for each byte of text."""
_MAX_PROCESSES = 6  # of up to 150 MB each


def usable_cores() -> int:
    """The number of cores that this process may run on; if the system doesn't tell, of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_in_parallel(
    chunks: Iterable[Sequence[Line]], tokenizer: ChatTokenizer, max_seq_len: int, pairs: bool = False
) -> Generator[Chunk, None, None]:
    """`encode_lines` of every chunk, in order. Reads only as many chunks ahead as keep the processes busy. These end
    with this generator, also if it is closed early.

    Raises InfrastructureError `tokenising_failed` if one of them dies.
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
        """Runs on a thread, which waits for an idle process, or starts one if none is idle."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent process
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

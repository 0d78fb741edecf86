"""Captures everything a process prints, line by line: Python's print and logging, C libraries, subprocesses, crashes.

File descriptors 1 and 2 are replaced by one pipe, so lines keep the order in which they were written. A thread reads
the pipe and hands over batches; a complete line is not held back for longer than `FLUSH_S`.
"""

import contextlib
import io
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

Line = tuple[str, str]
"""(RFC 3339 UTC time at which the line was read, message without its newline)."""

Sink = Callable[[list[Line]], None]

FLUSH_S = 0.05
BATCH_LINES = 500
MAX_LINE_BYTES = 64 * 1024


class OutputCapture:
    """Sends this process's output to `sink` until `close`.

    `sink` is called from one thread, with at least one line, in order. It may block: the pipe then fills up and writers
    wait, which bounds memory. If it raises, the lines go to the original stderr instead, and capture goes on. Of a line
    that is redrawn with carriage returns (a progress bar), the last state is kept. With `tee`, the original stdout gets
    everything, too. Output that the original stdout or stderr can't take (a full disk) is lost there without an error.
    """

    def __init__(self, sink: Sink, *, tee: bool = False) -> None:
        self._sink = sink
        self._tee = tee
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            if isinstance(stream, io.TextIOWrapper):
                # Before the descriptor becomes a pipe: the stream of a file asks for its position.
                stream.reconfigure(line_buffering=True, errors="backslashreplace")
        self._saved = (os.dup(1), os.dup(2))
        self._read_fd, write_fd = os.pipe()
        os.dup2(write_fd, 1)
        os.dup2(write_fd, 2)
        os.close(write_fd)
        self._closing = threading.Event()
        self._flushes: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._pump, name="output-capture", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Returns once every line written so far has been handed over: after at most half a second, plus the time that
        `sink` takes."""
        flushed = threading.Event()
        self._flushes.put(flushed)
        while self._thread.is_alive() and not flushed.wait(0.5):
            pass

    def close(self) -> None:
        """Restores descriptors 1 and 2, and returns once every line written so far has been handed over."""
        if self._closing.is_set():
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._closing.set()
        os.dup2(self._saved[0], 1)
        os.dup2(self._saved[1], 2)
        # A child process may still hold the pipe open, so the end is not always an end-of-file: the pump also stops
        # once the pipe is empty after `_closing`.
        self._thread.join()
        for fd in self._saved:
            os.close(fd)

    def _pump(self) -> None:
        os.set_blocking(self._read_fd, False)
        pending = b""
        lines: list[Line] = []
        last_sent = time.monotonic()
        flushes: list[threading.Event] = []
        while True:
            while not self._flushes.empty():  # before reading, so that output from before the request is read below
                flushes.append(self._flushes.get())
            closing = self._closing.is_set()  # before reading, for the same reason
            chunk = self._read()
            if chunk is not None:
                if self._tee:
                    write_or_lose(self._saved[0], chunk)
                *complete, pending = (pending + chunk).split(b"\n")
                lines += [_line(raw) for raw in complete]
                if len(pending) > MAX_LINE_BYTES:
                    lines.append(_line(pending))
                    pending = b""
            done = chunk == b"" or (chunk is None and closing)
            if done and pending:
                lines.append(_line(pending))
            flush = bool(flushes) and chunk is None  # all output from before the request has been read
            if lines and (done or flush or len(lines) >= BATCH_LINES or time.monotonic() - last_sent >= FLUSH_S):
                self._send(lines)
                lines, last_sent = [], time.monotonic()
            if flush:
                while flushes:
                    flushes.pop().set()
            if done:
                os.close(self._read_fd)
                return
            if chunk is None:
                self._wait(FLUSH_S if lines else 0.5)

    def _read(self) -> bytes | None:
        """Available bytes; None if there are none now; b"" at the end of the pipe."""
        try:
            return os.read(self._read_fd, 1 << 16)
        except BlockingIOError:
            return None

    def _wait(self, timeout_s: float) -> None:
        """Returns when there is something to read or the pipe has ended, or after `timeout_s`."""
        poll = select.poll()  # unlike select() it takes descriptors above 1023
        poll.register(self._read_fd, select.POLLIN)
        poll.poll(1000 * timeout_s)

    def _send(self, lines: list[Line]) -> None:
        try:
            self._sink(lines)
        except Exception as error:  # noqa: BLE001  -- a lost log service must not stop training; the operator sees why
            text = "".join(f"{timestamp} {message}\n" for timestamp, message in lines)
            undelivered = f"{text}(not delivered to the job's log: {error})\n"
            write_or_lose(self._saved[1], undelivered.encode(errors="backslashreplace"))


def write_or_lose(fd: int, data: bytes) -> None:
    """Writes as much of the data as `fd` takes: its disk may be full, or its reader gone. Never raises OSError: the
    thread that copies output must go on."""
    view = memoryview(data)
    with contextlib.suppress(OSError):
        while view:
            view = view[os.write(fd, view) :]


def _line(raw: bytes) -> Line:
    text = raw.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode(errors="replace")
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return now, text

"""`python -m benchmarks.tails [--readers 1000]`: many readers follow one job that writes 10 lines a second.

Each reader has its own HTTP connection through HAProxy. The latency is the time from handing a line to the log queue to
its arrival, for every line and reader. If a reader misses a line or gets it twice, the measurement fails.
"""

import argparse
import asyncio
import gc
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.load import Latency
from benchmarks.material import job, make_material
from examples.client import Client
from serve_app.local import LocalService

LINES, PER_SECOND = 300, 10
_LINE = re.compile(rb'"line (\d+) ([\d.]+)"')
FOLLOW_S = 180.0
"""Maximum time for all readers to follow the job."""
WRITER = """
import asyncio, sys, time
from pathlib import Path
import ray
from events.actors import connect
address, storage, job_id, lines, per_second = sys.argv[1:]
ray.init(address, namespace="tunewright", log_to_driver=False)
queue = connect(Path(storage)).lines
sys.stdin.readline()  # when every reader is there
async def write():
    began = time.time()
    for number in range(int(lines)):
        await asyncio.sleep(max(0, began + number / int(per_second) - time.time()))
        await queue.append(job_id, "benchmark", number, [("2026-11-24T00:00:00Z", f"line {number} {time.time()}")])
asyncio.run(write())
"""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--readers", type=int, default=1000)
    readers = parser.parse_args().readers
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        model, data = make_material(Path(folder), 64)
        env = {"TUNEWRIGHT_DATA_ROOTS": folder, "TUNEWRIGHT_MODEL_ROOTS": folder}
        with LocalService(Path(folder) / "storage", env=env) as service:
            # A paused job, so that only the readers and the lines use this machine.
            client = Client(service.url)
            job_id = client.submit(job(model, data))["job_id"]
            client.pause(job_id)
            while not client.status(job_id).get("why", "").startswith("paused"):
                time.sleep(0.2)
            arguments = [service.ray_address, str(service.storage), job_id, str(LINES), str(PER_SECOND)]
            with subprocess.Popen([sys.executable, "-c", WRITER, *arguments], env=service.env, stdin=-1) as writer:
                latency = asyncio.run(asyncio.wait_for(follow(service.url, job_id, readers, writer), FOLLOW_S))
    print(f"{readers:,} readers, {latency.n:,} lines read: p50 {latency.p50_ms:.0f} ms, p99 {latency.p99_ms:.0f} ms")
    return 0


async def follow(url: str, job_id: str, readers: int, writer: "subprocess.Popen[bytes]") -> Latency:
    """Opens all readers, starts the writer, and returns when every reader has all lines."""
    where = urlsplit(url)
    assert where.hostname is not None
    assert where.port is not None
    host, port = where.hostname, where.port
    loop = asyncio.get_running_loop()
    gc.disable()  # it would scan all received lines again and again, in pauses of 0.2 s
    started = time.perf_counter()
    following = [
        (await loop.create_connection(lambda: _Reader(where.netloc, job_id), host, port))[1] for _ in range(readers)
    ]
    await asyncio.gather(*(reader.there for reader in following))
    assert writer.stdin is not None
    writer.stdin.write(b"\n")
    writer.stdin.flush()
    await asyncio.gather(*(reader.taken for reader in following))
    took = time.perf_counter() - started
    for reader in following:  # not before: closing a connection is work for the processes that serve the others
        reader.leave()
    return Latency.of([seconds for reader in following for seconds in reader.seconds()], took)


class _Reader(asyncio.Protocol):
    """One connection. It does as little as possible per line, as all readers share the machine with the service."""

    def __init__(self, host: str, job_id: str) -> None:
        self._request = f"GET /fine_tuning/jobs/tail?job_id={job_id} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        self._received: list[tuple[float, bytes]] = []
        self._lines = 0
        self.there: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.there.done():
            assert b" 200 " in data.partition(b"\r\n")[0], data
            self.there.set_result(None)
        self._received.append((time.time(), data))
        self._lines += data.count(b'"line ')
        if self._lines >= LINES and not self.taken.done():
            self.taken.set_result(None)

    def leave(self) -> None:
        self._transport.close()

    def connection_lost(self, _error: Exception | None) -> None:
        for future in (self.there, self.taken):
            if not future.done():
                future.set_exception(RuntimeError(f"the stream ended after {self._lines} lines"))

    def seconds(self) -> list[float]:
        """The latency of each line. A line that came in two parts counts from the last one."""
        taken: list[float] = []
        text = b""
        for at, data in self._received:
            text += data
            *whole, text = text.split(b"\n")
            for line in whole:
                for number, sent in _LINE.findall(line):
                    assert int(number) == len(taken), f"line {int(number)} came after {len(taken) - 1}"
                    taken.append(at - float(sent))
        return taken


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.tails [--readers 1000]`: many readers follow one job that writes 10 lines a second.

Each reader is a connection of its own, over HTTP through HAProxy. Latency: from the moment a line is handed to the log
queue to its arrival, at every reader. A line that a reader never sees, or sees twice, ends the measurement.
"""

import argparse
import asyncio
import json
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
FOLLOW_S = 180.0
"""All readers together may take so long."""
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
            # A paused one, so that nothing but the readers and the lines keeps this machine busy.
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
    """Opens all readers, lets the lines come, and returns when every reader has all of them."""
    there = asyncio.Semaphore(0)
    started = time.perf_counter()
    following = [asyncio.create_task(_read(url, job_id, there)) for _ in range(readers)]
    for _ in range(readers):
        await there.acquire()
    assert writer.stdin is not None
    writer.stdin.write(b"\n")
    writer.stdin.flush()
    taken = await asyncio.gather(*following)
    return Latency.of([seconds for one in taken for seconds in one], time.perf_counter() - started)


async def _read(url: str, job_id: str, there: asyncio.Semaphore) -> list[float]:
    where = urlsplit(url)
    reader, connection = await asyncio.open_connection(where.hostname, where.port)
    connection.write(f"GET /fine_tuning/jobs/tail?job_id={job_id} HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head.partition(b"\r\n")[0], head
    taken: list[float] = []
    there.release()
    while len(taken) < LINES:
        text = await reader.readline()
        assert text, "the stream ended"
        now = time.time()
        if not text.startswith(b"{"):
            continue  # the length of a chunk
        for line in json.loads(text)["logs"]:
            word, _, rest = line["message"].partition(" ")
            number, _, sent = rest.partition(" ")
            if word == "line" and number.isdigit():
                assert int(number) == len(taken), f"line {number} came after {len(taken) - 1}"
                taken.append(now - float(sent))
    connection.close()
    return taken


if __name__ == "__main__":
    sys.exit(main())

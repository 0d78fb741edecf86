"""Readers of a job's log whose connections break again and again, or who stall."""

import json
import random
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.faults.killing import OTHERS, Faults, step_of
from tests.waiting import eventually

MANY_LINES = """
import asyncio, sys
from pathlib import Path
import ray
from events.actors import connect
address, storage, job_id, count = sys.argv[1:]
ray.init(address, namespace="tunewright", log_to_driver=False)
lines = connect(Path(storage)).lines
async def write():
    for first in range(0, int(count), 500):
        batch = [("2026-11-22T20:00:00Z", f"{number} " + "x" * 500) for number in range(first, first + 500)]
        await lines.append(job_id, "many", first, batch)
asyncio.run(write())
"""
LINES = 60_000
"""In a tail each has some 600 bytes: 36 MB for each reader, far more than the buffers of sockets hold."""
STALLED = 10
MAY_GROW = 100 << 20
"""Bytes by which the processes that serve the readers may grow. Output queued for all ten would take 360 MB."""


@pytest.mark.timeout(3600)
def test_a_reader_that_is_cut_off_again_and_again_sees_every_line_once(faults: Faults, long: bool, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311  -- where connections break
    cuts = 0
    while cuts < (500 if long else 20):
        job_id = faults.submit()
        seen, times = _read_in_pieces(faults, job_id, rng)
        assert faults.job(job_id)["status"] == "success"
        assert seen == [log for line in faults.api.tail(job_id) for log in line["logs"]]
        cuts += times


def _read_in_pieces(faults: Faults, job_id: str, rng: random.Random) -> tuple[list[dict[str, Any]], int]:
    """Follows a job to its end over connections that break after a few lines each. Returns its lines, and how many
    connections broke."""
    seen: list[dict[str, Any]] = []
    after = cuts = 0
    while True:
        want = len(seen) + rng.randrange(1, 20)
        parameters: dict[str, str | int] = {"job_id": job_id, "after": after}
        with faults.api.http.stream("GET", "/fine_tuning/jobs/tail", params=parameters, timeout=120) as stream:
            for text in stream.iter_lines():
                line = json.loads(text)
                seen += line["logs"]
                after = line["next"]
                if "status" in line:
                    return seen, cuts
                if len(seen) >= want:
                    break
        cuts += 1


@pytest.mark.timeout(3600)
def test_stalled_readers_take_no_memory_and_do_not_slow_other_requests(faults: Faults) -> None:
    job_id = faults.submit()
    faults.until(job_id, lambda job: step_of(job) > 0)
    service = faults.api.service
    arguments = [service.ray_address, str(service.storage), job_id, str(LINES)]
    subprocess.run([sys.executable, "-c", MANY_LINES, *arguments], env=service.env, check=True, timeout=600)
    kinds = ("Serve replica", "log queue", "proxy")
    servers = [process for kind in kinds for process in faults.api.processes(*OTHERS[kind][0])]
    before = _own_memory(servers)
    stalled = [_ask_and_read_nothing(service.url, job_id) for _ in range(STALLED)]
    for reader in stalled:
        eventually(partial(_readable, reader), 60, lambda: "nothing was sent to the reader")
    longest: list[float] = []
    done = threading.Event()
    other = threading.Thread(target=_ask_for_status, args=(faults, job_id, done, longest))
    other.start()
    read = sum(len(line["logs"]) for line in faults.api.tail(job_id, follow="false"))  # this reader does read
    grown = _own_memory(servers) - before
    done.set()
    other.join()
    assert read >= LINES
    print(f"grown by {grown / 2**20:.0f} MiB, a status took at most {max(longest):.2f} s")  # noqa: T201
    assert grown < MAY_GROW, f"{grown / 2**20:.0f} MiB more"
    assert max(longest) < 5, f"a status took {max(longest):.1f} s"
    for reader in stalled:
        reader.close()
    faults.api.cancel(job_id)
    faults.until(job_id, lambda job: job["status"] in ("cancelled", "success"))


def _ask_and_read_nothing(url: str, job_id: str) -> socket.socket:
    where = urlsplit(url)
    host, _, port = where.netloc.partition(":")
    reader = socket.create_connection((host, int(port)))
    reader.sendall(f"GET /fine_tuning/jobs/tail?job_id={job_id} HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
    return reader


def _readable(reader: socket.socket) -> bool:
    reader.settimeout(0.1)
    try:
        return bool(reader.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False


def _ask_for_status(faults: Faults, job_id: str, done: threading.Event, longest: list[float]) -> None:
    """Asks for the job's status until `done`, and notes how long each answer takes."""
    with httpx.Client(base_url=faults.api.service.url, timeout=30, trust_env=False) as http:
        while not done.wait(0.05):
            began = time.monotonic()
            assert http.get("/fine_tuning/jobs/status", params={"job_id": job_id}).is_success
            longest.append(time.monotonic() - began)


def _own_memory(processes: list[psutil.Process]) -> int:
    """Memory that only these processes use. Ray's object store, which they share, is not counted."""
    return sum(process.memory_full_info().uss for process in processes)

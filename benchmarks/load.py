"""Latency and throughput of the API, measured from outside by a client on the same machine."""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpx


class Latency(NamedTuple):
    """Percentiles in milliseconds (nearest rank), the number of measurements, and how many were made per second."""

    p50_ms: float
    p99_ms: float
    n: int
    per_second: float

    @classmethod
    def of(cls, seconds: list[float], wall_s: float) -> "Latency":
        ordered = sorted(seconds)

        def percentile(share: float) -> float:
            return 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)]

        return cls(percentile(0.5), percentile(0.99), len(ordered), len(ordered) / wall_s)


async def measure(request: Callable[[int], Awaitable[None]], connections: int, seconds: float) -> Latency:
    """Closed loop: `connections` clients, each with one request in flight, until `seconds` are over.

    `request` is called with the number of its client and raises when the answer isn't the right one.
    """
    taken: list[float] = []
    started = time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - started < seconds:
            before = time.perf_counter()
            await request(number)
            taken.append(time.perf_counter() - before)

    await asyncio.gather(*(client(number) for number in range(connections)))
    return Latency.of(taken, time.perf_counter() - started)


async def submit_latency(url: str, config: dict[str, Any], count: int) -> tuple[Latency, list[str]]:
    """Submits `count` jobs, one after the other; a submit answers once the job is on disk. Also returns the ids."""
    taken, ids = [], []
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        started = time.perf_counter()
        for _ in range(count):
            before = time.perf_counter()
            answer = (await http.post("/fine_tuning/jobs/submit", json=config)).raise_for_status()
            taken.append(time.perf_counter() - before)
            ids.append(answer.json()["job_id"])
        return Latency.of(taken, time.perf_counter() - started), ids


class _Connection:
    """HTTP/1.1 GET over one kept-alive connection. (httpx takes longer for a request than the service does.)"""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._address = (host, port)
        self._request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self) -> None:
        """Raises RuntimeError for any answer but a 200 with a Content-Length."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status, _, headers = head.partition(b"\r\n")
        if b" 200 " not in status or b"content-length: " not in headers:
            raise RuntimeError(f"unexpected answer: {head.decode(errors='replace')}")
        await reader.readexactly(int(headers.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0]))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def status_load(url: str, job_id: str, connections: int, seconds: float) -> Latency:
    """GET status of one job over `connections` kept-alive connections."""
    address = httpx.URL(url)
    assert address.port is not None
    path = f"/fine_tuning/jobs/status?job_id={job_id}"
    clients = [_Connection(address.host, address.port, path) for _ in range(connections)]
    try:
        await measure(lambda number: clients[number].get(), connections, 1)  # warms up connections and caches
        return await measure(lambda number: clients[number].get(), connections, seconds)
    finally:
        for client in clients:
            client.close()


async def tail_latency(url: str, job_id: str) -> tuple[Latency, list[tuple[str, str]]]:
    """Follows a job to its end. The latency of a line is the time from its timestamp, when the worker wrote it, to its
    arrival. Lines written before the stream was open don't count. Also returns every (timestamp, message)."""
    taken: list[float] = []
    lines: list[tuple[str, str]] = []
    opened = datetime.now(UTC)
    started = time.perf_counter()
    async with (
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http,
        http.stream("GET", "/fine_tuning/jobs/tail", params={"job_id": job_id}) as answer,
    ):
        answer.raise_for_status()
        async for raw in answer.aiter_lines():
            now = datetime.now(UTC)
            for line in json.loads(raw)["logs"]:
                lines.append((line["timestamp"], line["message"]))
                written = datetime.fromisoformat(line["timestamp"])
                if written > opened:
                    taken.append((now - written).total_seconds())
    return Latency.of(taken, time.perf_counter() - started), lines

"""`python -m benchmarks.event_log`: durable appends per second, and the time to open a log of a million events.

Writers are coroutines of one process. Each has its own job and waits for its acknowledgement before it appends again.
An event is the metrics of one step, as a training worker sends it. For comparison, the same run measures such events
written to the same table without group commit (a transaction and an fsync each), and the disk alone (4 KiB writes, each
followed by fdatasync). As each writer has one append in flight, 64 writers get at most 64 acknowledgements per fsync.

Through Ray: the same writers in PROCESSES processes, and the log in its actor, on a cluster with nothing else. The CPU
time is then that of the actor.

`--rows N` opens a log of N events (default a million). Writes its section of benchmarks/README.md.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray

from benchmarks.report import SERVICE, heading, table, write_section
from events.actors import AnyLog, EventLogClient, blocking, collect_rarely, connect
from events.codec import encode
from events.facts import (
    DataReport,
    DataValidated,
    Event,
    JobAdmitted,
    JobSubmitted,
    MetricsRecorded,
    Resources,
    RunStarted,
    StepMetrics,
)
from events.ids import new_event_id, new_job_id
from events.log import EventLog
from events.sqlite import SqliteStore
from events.store import Recorded
from tests.conftest import a_ray_cluster

JOBS = 1000
PROCESSES = 4
SNAPSHOT_S = 300.0
"""Maximum time for a log to write its snapshot."""
RESOURCES = Resources(workers=1, nodes=1, cpus_per_worker=1, gpus_per_worker=0)
SUBMITTED = JobSubmitted(
    config={"model": "smollm2-135m-instruct", "data": "file:///data/train.jsonl"},
    resources=RESOURCES,
    max_restarts=3,
    submission_id="ftjob-1",
)
REPORT = DataReport(
    uri="file:///data/train.jsonl", rows=1000, invalid_rows=0, tokens=100_000, trained_tokens=40_000, truncated_rows=0,
    max_seq_len=2048, length_histogram={"128": 1000}, errors=[],
)  # fmt: skip
RUNNING: list[Event] = [
    DataValidated(data=REPORT),
    JobAdmitted(),
    RunStarted(attempt=1, workers=1, nodes=1, device="cpu", total_steps=1000, n_epochs=1, logs="file:///m.jsonl"),
]


class Speed(NamedTuple):
    """`cpu_us`: CPU time of the process per event. It depends less on what else runs on the machine."""

    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


def speed(latencies_s: Sequence[float], events: int, elapsed_s: float, cpu_s: float) -> Speed:
    ordered = sorted(latencies_s)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return Speed(events / elapsed_s, p50 * 1e3, p99 * 1e3, cpu_s / events * 1e6)


def measured(step: int) -> MetricsRecorded:
    metrics = StepMetrics(
        step=step, epoch=1, time="2026-11-24T12:00:00.000000Z", loss=1.2345678, lr=2e-5, grad_norm=0.98765, tokens=2048,
        tokens_per_second=12345.6, peak_memory_bytes=123_456_789,
    )  # fmt: skip
    return MetricsRecorded(attempt=1, steps=[metrics])


async def appends(file: Path, writers: int, at_once: int, seconds: float) -> Speed:
    """Measures `writers` on a log in this process. `at_once`: events in each append."""
    log = EventLog(SqliteStore(file))
    job_ids = await running_jobs(log, writers)
    began, cpu = time.perf_counter(), time.process_time()
    latencies = await write(log, job_ids, at_once, seconds)
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    await log.close()
    return speed(latencies, len(latencies) * at_once, elapsed, cpu)


async def running_jobs(log: AnyLog, count: int) -> list[str]:
    """Starts `count` jobs in the log; their ids."""
    job_ids = [new_job_id() for _ in range(count)]
    for job_id in job_ids:
        await log.submit(job_id, SUBMITTED, new_event_id(), JOBS)
        await log.append(job_id, RUNNING, [new_event_id() for _ in RUNNING])
    return job_ids


async def write(log: AnyLog, job_ids: Sequence[str], at_once: int, seconds: float) -> list[float]:
    """Appends to each job for `seconds`, with one writer per job; the seconds that each append took."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    events: list[Event] = [measured(number + 1) for number in range(at_once)]

    async def append(job_id: str) -> None:
        while (began := time.perf_counter()) < end:
            # Ids that sort by time like ULIDs, but cheap to make: in the service, other processes make events and ids.
            await log.append(job_id, events, [f"{time.time_ns()}:{job_id[-8:]}:{number}" for number in range(at_once)])
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*map(append, job_ids))
    return latencies


class Writers:
    """A process that runs writers."""

    def __init__(self, log: EventLogClient) -> None:
        self._log = log

    def pid(self) -> int:
        """Returns once the process runs."""
        return os.getpid()

    def write(self, job_ids: list[str], at_once: int, seconds: float) -> list[float]:
        return asyncio.run(write(self._log, job_ids, at_once, seconds))


def through_ray(storage: Path, writers: int, seconds: float) -> Iterator[tuple[int, Speed]]:
    """Measures `writers` through Ray: (events in each append, speed), for one event and for ten."""
    with a_ray_cluster():
        log = connect(storage).log
        actor = psutil.Process(blocking(log.about()).pid)
        process_of_writers: Any = ray.remote(num_cpus=0)(Writers)  # Ray's types can't tell that it is a class
        processes = [process_of_writers.remote(log) for _ in range(PROCESSES)]
        job_ids = blocking(running_jobs(log, writers))
        ray.get([process.pid.remote() for process in processes], timeout=120)
        for at_once in (1, 10):
            began, cpu = time.perf_counter(), sum(actor.cpu_times()[:2])
            parts = [
                process.write.remote(job_ids[number::PROCESSES], at_once, seconds)
                for number, process in enumerate(processes)
            ]
            latencies = [one for part in ray.get(parts, timeout=seconds + 120) for one in part]
            elapsed, cpu = time.perf_counter() - began, sum(actor.cpu_times()[:2]) - cpu
            yield at_once, speed(latencies, len(latencies) * at_once, elapsed, cpu)


def single_appends(file: Path, seconds: float) -> Speed:
    """Measures the store alone, with a transaction for each event."""
    latencies: list[float] = []
    with closing(SqliteStore(file)) as store:
        began, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() < began + seconds:
            start = time.perf_counter()
            number, event = len(latencies), measured(len(latencies))
            one = Recorded(number + 1, "ftjob-1", number, new_event_id(), datetime.now(UTC), event)
            store.append([(one, encode(event))])
            latencies.append(time.perf_counter() - start)
        return speed(latencies, len(latencies), time.perf_counter() - began, time.process_time() - cpu)


def syncs(file: Path, seconds: float) -> Speed:
    """Measures the disk alone: 4 KiB writes, each followed by fdatasync."""
    latencies: list[float] = []
    with file.open("wb", buffering=0) as opened:
        began, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() < began + seconds:
            start = time.perf_counter()
            os.pwrite(opened.fileno(), bytes(4096), len(latencies) % 256 * 4096)
            os.fdatasync(opened.fileno())
            latencies.append(time.perf_counter() - start)
        return speed(latencies, len(latencies), time.perf_counter() - began, time.process_time() - cpu)


def opening(file: Path, events: int) -> tuple[float, float, float]:
    """Seconds to open a log of `events` events of JOBS jobs, without a snapshot and with one; and its size in MiB."""
    with closing(SqliteStore(file)) as store:
        first: list[Event] = [SUBMITTED, *RUNNING]
        for start in range(0, events, 5000):
            batch = []
            for number in range(start, min(start + 5000, events)):
                nth = number // JOBS
                event = first[nth] if nth < len(first) else measured(nth)
                one = Recorded(number + 1, f"ftjob-{number % JOBS}", nth, f"{number:09}", datetime.now(UTC), event)
                batch.append((one, encode(event)))
            store.append(batch)
    without = asyncio.run(open_and_close(file, wait_for_snapshot=True))
    return without, asyncio.run(open_and_close(file)), file.stat().st_size / 2**20


async def open_and_close(file: Path, *, wait_for_snapshot: bool = False) -> float:
    """Seconds until the log answers a read."""
    began = time.perf_counter()
    log = EventLog(SqliteStore(file))
    jobs, _ = await log.jobs(1)
    elapsed = time.perf_counter() - began
    assert jobs
    if wait_for_snapshot:
        snapshot = file.with_name(file.name + ".snapshot")
        async with asyncio.timeout(SNAPSHOT_S):  # none is written of fewer than 20,000 events
            while not snapshot.exists():  # noqa: ASYNC110  -- another thread writes it
                await asyncio.sleep(0.1)
    await log.close()
    return elapsed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.event_log")
    parser.add_argument("--rows", type=int, default=1_000_000, help="events of the log that is opened")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of appends")
    arguments = parser.parse_args(argv)
    head = heading("python -m benchmarks.event_log")  # made first, so that its load isn't that of this program
    rows: list[tuple[str, Speed]] = []
    collect_rarely()  # as in the log's own process
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-", dir=Path.cwd()) as folder:
        scratch = Path(folder)
        rows.append(("the disk alone: 4 KiB and fdatasync", syncs(scratch / "sync", arguments.seconds)))
        rows.append(("SQLite, a transaction for each event", single_appends(scratch / "one.db", arguments.seconds)))
        for at_once in (1, 10):
            for writers in (1, 64, 256):
                file = scratch / f"{writers}-{at_once}.db"
                what = f"{writers} writer{'s' * (writers > 1)}, {at_once} event{'s' * (at_once > 1)} an append"
                rows.append((what, asyncio.run(appends(file, writers, at_once, arguments.seconds))))
                print(what, rows[-1][1], flush=True)
        for at_once, one in through_ray(scratch / "storage", 64, arguments.seconds):
            what = f"64 writers through Ray, {at_once} event{'s' * (at_once > 1)} an append"
            rows.append((what, one))
            print(what, one, flush=True)
        rows.append(("the disk alone, again", syncs(scratch / "sync", arguments.seconds)))
        without, with_snapshot, size = opening(scratch / "many.db", arguments.rows)
    cells = [
        [what, f"{one.per_second:,.0f}", f"{one.p50_ms:.1f} ms", f"{one.p99_ms:.1f} ms", f"{one.cpu_us:.0f} µs"]
        for what, one in rows
    ]
    text = "\n".join(
        [
            f"{head}\n",
            table(["", "durable events/s", "p50", "p99", "CPU per event"], cells),
            f"Opening a log of {arguments.rows:,} events of {JOBS:,} jobs ({size:,.0f} MiB), until it answers: "
            f"{with_snapshot:.2f} s with a snapshot (goal: under 5 s), {without:.1f} s without one.",
        ]
    )
    print(text)
    write_section("the event log", text, SERVICE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

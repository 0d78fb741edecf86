"""Time and memory of preparing data, and of the schedule of an epoch.

    python -m benchmarks.data --rows 1000000

Writes dialogs of about 100 tokens, prepares them twice, as two jobs would, with the tokenizer of the demo model, and
goes through the schedule of an epoch. Prints lines for the table of README.md.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics  # English text that comes with Python

import numpy as np
import psutil

from trainers.data.cache import DataCache
from trainers.data.chat import ChatTokenizer
from trainers.data.dataset import TokenisedDataset
from trainers.data.prepare import prepare

BATCH_ROWS = 4
MAX_SEQ_LEN = 2048


def write_rows(file: Path, count: int) -> None:
    """Writes dialogs with a system message, a question and an answer, of consecutive words of Python's manual."""
    words = " ".join(topics.values()).split()
    rng = random.Random(0)  # noqa: S311  -- the same rows each time

    def text(shortest: int, longest: int) -> str:
        length = rng.randint(shortest, longest)
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            dialog = [
                {"role": "system", "content": "Answer briefly."},
                {"role": "user", "content": text(15, 45)},
                {"role": "assistant", "content": text(10, 35)},
            ]
            out.write(json.dumps({"dialog": dialog}) + "\n")


@dataclass
class Cost:
    """The cost of a block of code and of the processes it started. `peak_mb`: their resident memory together, sampled
    every 0.1 s; shared pages are counted in each."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    cost, done = Cost(), threading.Event()
    this = psutil.Process()

    def watch() -> None:
        while True:
            cost.peak_mb = max(cost.peak_mb, sum(map(_resident_mb, [this, *this.children(recursive=True)])))
            if done.wait(0.1):
                return

    def cpu_s() -> float:
        return sum(os.times()[:4])

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), cpu_s()
    try:
        yield cost
    finally:
        cost.wall_s, cost.cpu_s = time.perf_counter() - wall, cpu_s() - cpu
        done.set()
        watcher.join()


def _resident_mb(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 2**20
    except psutil.Error:
        return 0.0


def report(what: str, rows: int, cost: Cost) -> None:
    print(
        f"| {what} | {cost.wall_s:,.1f} s | {rows / cost.wall_s:,.0f} | {cost.cpu_s * 1e6 / rows:,.0f} µs "
        f"| {cost.peak_mb:,.0f} MiB |",
        flush=True,
    )


def measure_schedules(data: TokenisedDataset) -> None:
    from trainers.training.batches import Progress, Schedule  # imports torch

    def schedule(group_by_length: bool = False, pack_to: int | None = None) -> Schedule:
        return Schedule(
            data.lengths,
            data.trained,
            n_epochs=1,
            batch_size=BATCH_ROWS,
            shuffle_seed=0,
            group_by_length=group_by_length,
            pack_to=pack_to,
        )

    for grouped in (False, True):
        places = tokens = 0
        with measured() as cost:
            for step in schedule(group_by_length=grouped).steps(Progress()):
                for micro_batch in step.micro_batches:
                    lengths = [int(data.lengths[item].sum()) for item in micro_batch]
                    places += len(lengths) * max(lengths)
                    tokens += sum(lengths)
        name = "grouped by length" if grouped else "of any length"
        report(f"an epoch's steps, {name}: fill {tokens / places:.2f} at {BATCH_ROWS} rows a batch", len(data), cost)
    with measured() as cost:
        schedule(pack_to=MAX_SEQ_LEN)
    report(f"packing to {MAX_SEQ_LEN} tokens", len(data), cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows: int = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        # In a process of its own, as it imports torch, whose memory isn't to be measured.
        script = "import sys, trainers.models.smollm2 as m; m.convert(m.packaged_gguf(), m.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", script, str(folder / "model")], check=True)
        write_rows(folder / "rows.jsonl", rows)
        tokenizer = ChatTokenizer.from_dir(folder / "model")
        cache = DataCache(folder / "cache", 1 << 40)
        print("| | time | rows/s | CPU per row | peak memory |\n|---|---|---|---|---|")
        for job in ("first", "second"):
            with measured() as cost:
                prepare(
                    (folder / "rows.jsonl").as_uri(),
                    tokenizer,
                    max_seq_len=MAX_SEQ_LEN,
                    out_dir=folder / job,
                    cache=cache,
                    progress=lambda _: None,
                )
            report(f"prepare, {job} job on the data", rows, cost)
        data = TokenisedDataset(folder / "second")
        with measured() as cost:
            data.trained.sum()
        report("trained tokens of each row", rows, cost)
        measure_schedules(data)
        print(f"\n{np.mean(data.lengths):.0f} tokens a row")


if __name__ == "__main__":
    main()

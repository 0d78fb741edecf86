"""`python -m benchmarks.recovery [kind ...]`: how long a job doesn't train, and the API doesn't answer, after a
process is killed.

It starts a service with one endless job, and kills each kind of process (all kinds by default) several times with
SIGKILL. All kinds with `--times 3` take a quarter of an hour.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import table
from serve_app.local import LocalService
from tests.faults.killing import INTERVAL, OTHERS, OWNERS, Faults, Recovery, a_service, inputs_in, step_of
from tests.service.conftest import Api

KINDS = [*OWNERS, *OTHERS]


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.recovery")
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"one of: {', '.join(KINDS)}")
    parser.add_argument("--times", type=int, default=3, help="how often each is killed")
    arguments = parser.parse_args()
    kinds: list[str] = arguments.kinds or KINDS
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        (inputs := Path(folder) / "inputs").mkdir()
        inputs_in(inputs)
        with a_service(Path(folder) / "storage", inputs) as service:
            recoveries = measure(service, inputs, kinds * arguments.times)
    rows = []
    for kind in kinds:
        of_kind = [recovery for recovery in recoveries if recovery.kind == kind]
        stood_still = [_seconds(statistics.median(values)) for values in list(zip(*of_kind, strict=True))[1:]]
        rows.append((kind, str(len(of_kind)), *stood_still, f"{os.getloadavg()[1]:.0f}"))
    header = ("killed", "times", "no longer `running` after", "trains again after", "door shut for", "load")
    print(table(header, rows))
    return 0


def measure(service: LocalService, inputs: Path, kinds: Sequence[str]) -> list[Recovery]:
    faults = Faults(Api(service, inputs / "tiny", inputs / "rows.jsonl"))
    options = {"n_epochs": 10_000, "extras": {"save_every_n_steps": INTERVAL, "keep_last_n_checkpoints": 2}}
    job_id = faults.submit(fine_tuning_options=options)
    recoveries = []
    for kind in kinds:
        _wait_for_a_checkpoint(faults, job_id)
        recoveries.append(faults.kill_and_recover(kind, job_id))
        print(recoveries[-1], file=sys.stderr)
    faults.api.cancel(job_id)
    return recoveries


def _wait_for_a_checkpoint(faults: Faults, job_id: str) -> None:
    begun = step_of(faults.job(job_id))
    faults.until(job_id, lambda job: job["status"] == "running" and step_of(job) > begun + 2 * INTERVAL)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value else "-"


if __name__ == "__main__":
    sys.exit(main())

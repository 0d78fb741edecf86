"""`python -m benchmarks.recovery`: how long a job and the door stand still after each kind of process is killed.

A service of its own on this machine, one job that trains for ever, and each kind killed TIMES times (SIGKILL).
"""

import statistics
import sys
import tempfile
from pathlib import Path

from serve_app.local import LocalService
from tests.faults.killing import INTERVAL, OTHERS, OWNERS, Faults, Recovery, a_service, make_inputs, step_of
from tests.service.conftest import Api

TIMES = 3


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        (inputs := Path(folder) / "inputs").mkdir()
        make_inputs(inputs)
        with a_service(Path(folder) / "storage", inputs) as service:
            recoveries = measure(service, inputs)
    print("| killed | no longer `running` after | trains again after | door shut for |\n|---|---|---|---|")
    for kind in OWNERS | OTHERS:
        of_kind = [recovery for recovery in recoveries if recovery.kind == kind]
        unowned, resumed, door = (statistics.median(values) for values in list(zip(*of_kind, strict=True))[1:])
        print(f"| {kind} | {_seconds(unowned)} | {_seconds(resumed)} | {_seconds(door)} |")
    return 0


def measure(service: LocalService, inputs: Path) -> list[Recovery]:
    faults = Faults(Api(service, inputs / "tiny", inputs / "rows.jsonl"))
    options = {"n_epochs": 100_000, "extras": {"save_every_n_steps": INTERVAL, "keep_last_n_checkpoints": 2}}
    job_id = faults.submit(fine_tuning_options=options)
    recoveries = []
    for kind in [*OWNERS, *OTHERS] * TIMES:
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

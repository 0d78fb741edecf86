"""`python -m benchmarks.finish`: the error of `estimated_finish` while a job trains. Takes about five minutes.

It follows one job of the demo's model and rows, with evaluations and checkpoints, over HTTP to its end. The error is
the distance between the estimate and the actual end (last step and its checkpoint), as a share of the time from the
first step to the end.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.report import heading, table
from examples.client import TERMINAL, Client
from serve_app.local import LocalService

ROOT = Path(__file__).parent.parent
TASK = ROOT / "examples" / "tickets"
FROM, GOAL = 0.05, 0.10
"""The goal holds after this share of the steps."""
EPOCHS = 2  # one evaluation before, one in the middle, one at the end
LOOK_S = 0.5
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def main() -> int:
    config = json.loads((TASK / "job.json").read_text())
    config |= {name: str(TASK / Path(config[name]).name) for name in ("data", "validation_data")}
    config["fine_tuning_options"] |= {"n_epochs": EPOCHS, "extras": {"log_every_n_steps": 1}}
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        env = {"TUNEWRIGHT_DATA_ROOTS": str(ROOT / "examples")}
        with LocalService(Path(folder) / "storage", env=env) as service:
            began, ended, seen = follow(Client(service.url), config)
    wrong = [(share, abs(estimate - ended) / (ended - began)) for share, estimate in seen if share >= FROM]
    rows = [(f"{at:.0%}", f"{next(off for share, off in wrong if share >= at):.1%}") for at in SHARES]
    worst = max(off for _, off in wrong)
    print(f"{heading('python -m benchmarks.finish', f'{ended - began:.0f} s of training')}\n")
    print(table(("after this share of the steps", "wrong by"), rows))
    print(f"\nAt worst {worst:.1%} after {FROM:.0%} of the steps (goal: under {GOAL:.0%}), of {len(wrong)} looks.")
    return 0 if worst < GOAL else 1


def follow(client: Client, config: dict[str, object]) -> tuple[float, float, list[tuple[float, float]]]:
    """The time of the job's first step, that of its end, and (share of the steps done, estimate) in between."""
    job_id = client.submit(config)["job_id"]
    began = 0.0
    seen: list[tuple[float, float]] = []
    with httpx.Client(base_url=client.url, trust_env=False) as http:
        while True:
            job = client.status(job_id)
            if job["status"] in TERMINAL:
                break
            progress = job.get("progress") or {"step": 0}
            estimate = http.get(f"/v1/fine_tuning/jobs/{job_id}").json()["estimated_finish"]
            if progress["step"] and estimate:
                began = began or time.time()
                seen.append((progress["step"] / progress["total_steps"], estimate))
            time.sleep(LOOK_S)
    if job["status"] != "success":
        raise RuntimeError(f"{job_id} ended as {job['status']}: {job.get('error')}")
    return began, time.time(), seen


if __name__ == "__main__":
    sys.exit(main())

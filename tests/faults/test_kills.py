"""Any process may be killed at any moment: the job goes on, and its result is that of an undisturbed job."""

import itertools
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.faults.killing import INTERVAL, OTHERS, OWNERS, STEPS, UNOWNED_S, Faults, logged, step_of, steps_by_attempt

TIMES = 20
"""How often the long suite kills each kind of process."""


@pytest.fixture(scope="module")
def undisturbed(faults: Faults) -> dict[str, Any]:
    return faults.until(faults.submit(), lambda job: job["status"] == "success")


@pytest.mark.timeout(6 * 3600)
def test_whatever_is_killed_every_job_finishes_with_the_losses_of_the_undisturbed_run(
    faults: Faults, undisturbed: dict[str, Any], long: bool, seed: int
) -> None:
    kinds = [*OWNERS, *OTHERS] * (TIMES if long else 1)
    rng = random.Random(seed)  # noqa: S311  -- a shuffle
    rng.shuffle(kinds)
    while kinds:
        job_id = faults.submit()
        interruptions = 0
        while kinds and _killable(faults, job_id):
            recovery = faults.kill_and_recover(kinds[-1], job_id)
            print(recovery)  # noqa: T201  -- pytest shows it with a failure
            assert recovery.unowned_s < UNOWNED_S, recovery
            interruptions += kinds.pop() in OWNERS
        job = faults.until(job_id, lambda job: job["status"] not in ("validation", "queued", "running"))
        assert job["status"] == "success", job
        assert job["interruptions"] == interruptions
        assert logged(job) == logged(undisturbed)
        lines = steps_by_attempt(faults.api.messages(job_id))
        for steps in lines:
            assert steps == list(range(steps[0], steps[-1] + 1))  # no line is lost or repeated
        for lost, resumed in itertools.pairwise(lines):
            # A checkpoint may be under way when the next one is due; then training waits for it.
            assert 0 <= lost[-1] - resumed[0] <= 2 * INTERVAL


def _killable(faults: Faults, job_id: str) -> bool:
    """Waits until the job runs and has a checkpoint. Returns False if it might end before the kill."""
    job = faults.until(job_id, lambda job: job["status"] == "success" or _has_run(job))
    return job["status"] == "running" and step_of(job) < 0.7 * STEPS


def _has_run(job: dict[str, Any]) -> bool:
    return job["status"] == "running" and bool(job["checkpoints"]) and step_of(job) > INTERVAL


def test_a_job_that_fails_by_its_user_s_fault_is_not_tried_again(faults: Faults, inputs: Path) -> None:
    broken = shutil.copytree(inputs / "tiny", inputs / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({name: weight * math.nan for name, weight in weights.items()}, broken / "model.safetensors")
    job_id = faults.submit(model=str(broken))
    job = faults.until(job_id, lambda job: job["status"] not in ("validation", "queued", "running"))
    assert (job["status"], job["interruptions"], job["attempt"]) == ("failed", 0, 1), job
    assert (job["error"]["code"], job["error"]["fault"]) == ("model_broken", "user")


def test_a_job_survives_as_many_interruptions_as_max_restarts_says(faults: Faults) -> None:
    job_id = faults.submit(overrides="--max-restarts 0")
    faults.until(job_id, lambda job: step_of(job) > 0)
    faults.kill("worker", job_id)
    job = faults.until(job_id, lambda job: job["status"] not in ("validation", "queued", "running"))
    assert (job["status"], job["error"]["code"], job["error"]["fault"]) == (
        "failed",
        "interrupted_too_often",
        "infrastructure",
    )
    assert job["interruptions"] == 1

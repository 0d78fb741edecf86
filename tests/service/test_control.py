"""Pausing, draining and going on, on real Ray: what is asked for happens, and no step is lost or done twice."""

import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import pytest

from tests.service.conftest import CPUS, FP32, Api, dashboard, free_cpus, losses, path_of, step_of, workers_of
from tests.service.nodes import another_node, held_by, nodes, submit_to
from tests.waiting import WAIT_S, eventually
from tests.wandb_file import end_of
from trainers.dispatching.cluster import RUN_ENV

pytestmark = pytest.mark.timeout(900)  # each wait in these has a limit of its own


def post(api: Api, action: str, **body: Any) -> dict[str, Any]:
    answer = api.http.post(f"/fine_tuning/jobs/{action}", json=body)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def until_paused(api: Api, job_id: str) -> dict[str, Any]:
    return api.until(job_id, lambda job: job.get("why") == "paused, until it is resumed")


def test_a_paused_job_holds_nothing_and_goes_on_as_if_it_had_not_been_paused(api: Api) -> None:
    undisturbed = api.submit(api.config(fine_tuning_options=FP32))
    job_id = api.submit(api.config(fine_tuning_options=FP32, overrides="--max-restarts 0"))
    api.until(job_id, lambda job: step_of(job) > 0)
    assert post(api, "pause", job_id=job_id)["pause_requested"]
    paused = until_paused(api, job_id)
    assert (paused["status"], paused["interruptions"]) == ("queued", 0)
    stopped_at = step_of(paused)
    assert max(losses(paused)) == stopped_at
    assert paused["checkpoints"][-1].endswith(f"step-{stopped_at:08d}")
    assert workers_of(api, job_id) == []
    api.until(undisturbed, lambda job: step_of(job) > 0)
    assert free_cpus(api) == CPUS - 1

    assert not post(api, "resume", job_id=job_id)["pause_requested"]
    api.until(job_id, lambda job: step_of(job) > stopped_at + 50)
    runs = dashboard(api, "/api/train/v2/runs/v1")["train_runs"]
    drivers = {run["job_id"] for run in runs if run["name"] == job_id}
    assert ([run["name"] for run in runs].count(job_id), len(drivers)) == (2, 1)
    api.until(undisturbed, lambda job: step_of(job) > stopped_at + 50)
    for one in (job_id, undisturbed):
        api.cancel(one)
        api.until_status(one, "cancelled")
    ours, theirs = losses(api.job(job_id)), losses(api.job(undisturbed))
    both = ours.keys() & theirs.keys()
    assert both >= set(range(1, stopped_at + 50))
    assert [ours[step] for step in sorted(both)] == [theirs[step] for step in sorted(both)]

    full = {"custom_training_options": {"finetuning_type": "full"}, "n_epochs": 1, "extras": {"max_steps_per_epoch": 2}}
    again = post(api, "resubmit", job_id=job_id, config={"fine_tuning_options": full})
    job = api.until_status(again["job_id"], "success")
    assert job["resubmitted_from"] == {
        "job_id": job_id,
        "checkpoint": api.job(job_id)["checkpoints"][-1],
        "base_model": api.job(job_id)["input_config"]["model"],
    }
    assert job["progress"]["step"] == 2
    assert losses(job)[1] < ours[1] - 0.5  # of the same rows: it starts from what the first job has learnt


def test_the_log_and_wandb_tell_how_a_run_ended_that_was_paused_interrupted_or_cancelled(api: Api) -> None:
    logger = {"log_type": "wandb", "project": "p"}
    job_id = api.submit(api.endless(logger=logger, overrides="--nproc_per_node 2"))

    def last_line() -> str:
        return str([log["message"] for line in api.tail(job_id, follow=False) for log in line["logs"]][-1])

    api.until(job_id, lambda job: step_of(job) > 0)
    post(api, "pause", job_id=job_id)
    paused = until_paused(api, job_id)
    assert end_of(path_of(paused["logs"])) == (1, True)
    assert last_line().startswith(f"stopped after step {step_of(paused)} of ")
    assert last_line().endswith("; it goes on once it is resumed")

    post(api, "resume", job_id=job_id)
    job = api.until(job_id, lambda job: step_of(job) > step_of(paused))
    first, second = sorted(workers_of(api, job_id), key=lambda worker: not worker.children())  # of W&B
    assert first.children()
    second.kill()
    api.until(job_id, lambda job: job["interruptions"] == 1)
    assert end_of(path_of(job["logs"])) == (1, False)

    api.until(job_id, lambda job: job["attempt"] == 3 and step_of(job) > step_of(paused))
    api.cancel(job_id)
    job = api.until_status(job_id, "cancelled")
    assert end_of(path_of(job["logs"])) == (255, False)
    left = path_of(job["checkpoints"][-1])
    assert (
        last_line()
        == f"cancelled after step {step_of(job)} of {job['progress']['total_steps']} (its last checkpoint: {left})"
    )


def test_a_job_whose_first_worker_hangs_is_cancelled_before_ray_would_kill_its_runner(api: Api) -> None:
    job_id = api.submit(api.endless())
    api.until(job_id, lambda job: step_of(job) > 0)
    (worker,) = workers_of(api, job_id)
    worker.suspend()
    began = time.monotonic()
    api.cancel(job_id)
    api.until_status(job_id, "cancelled")
    assert time.monotonic() - began < float(RUN_ENV["RAY_JOB_STOP_WAIT_TIME_S"])
    assert workers_of(api, job_id) == []


def test_workers_stand_in_equal_shares_of_the_nodes_and_move_at_a_checkpoint_from_one_that_is_drained(api: Api) -> None:
    service = api.service
    (head,) = nodes(service)  # it has room for both workers
    with ExitStack() as cluster:
        leaving = cluster.enter_context(another_node(service)).node_id
        overrides = "--nnodes 2 --nproc_per_node 1 --max-restarts 0"
        job_id = submit_to(api, api.config(fine_tuning_options=FP32, overrides=overrides))
        api.until(job_id, lambda job: step_of(job) > 0)
        assert len(workers_of(api, job_id)) == 2
        assert held_by(service, job_id) == {head: 1, leaving: 1}

        staying = cluster.enter_context(another_node(service)).node_id
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={service.ray_address}"]
        drain += [f"--node-id={leaving}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        drain += ["--deadline-remaining-seconds=600"]
        subprocess.run(drain, env=service.env, check=True, capture_output=True, timeout=WAIT_S)
        job = api.until(job_id, lambda job: job["attempt"] == 2 and job["status"] == "running")
        assert job["interruptions"] == 0
        stopped_at = int(job["checkpoints"][-1].rpartition("-")[2])
        job = api.until(job_id, lambda job: step_of(job) > stopped_at)
        done = sorted(losses(job))  # read once: the job goes on
        assert done == list(range(1, len(done) + 1))
        assert held_by(service, job_id) == {head: 1, staying: 1}
        api.cancel(job_id)
        api.until_status(job_id, "cancelled")
    eventually(lambda: nodes(service) == {head}, WAIT_S, lambda: "nodes that were taken away stay")

"""The product, end to end: real Ray, real training of a tiny model, HTTP in and checkpoints out."""

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.serve_app.client_journey import generate_client, journey
from tests.service.conftest import CPUS, Api, dashboard, free_cpus, path_of, workers_of
from tests.waiting import WAIT_S, eventually


def test_a_submitted_job_trains_and_hands_over_its_checkpoints(api: Api) -> None:
    options = {"n_epochs": 2, "batch_size": 4, "custom_training_options": {"lora_rank": 4}}
    config = api.config(
        validation_data=str(api.data),
        fine_tuning_options=options,
        logger={"filename": "my-metrics.jsonl"},
        metadata={"team": "tests"},
    )
    job_id = api.submit(config)
    lines = api.tail(job_id)
    job = api.job(job_id)
    assert job["status"] == "success", job
    assert lines[-1]["status"] == "success"
    assert job["input_config"] == config
    assert job["metadata"] == {"team": "tests"}
    assert job["progress"] == {"step": 12, "total_steps": 12, "epoch": 2, "n_epochs": 2}
    assert job["metrics"]["valid_loss"] < job["metrics"]["first_valid_loss"]
    assert datetime.fromisoformat(job["finished_at"]) > datetime.fromisoformat(job["created"])
    assert len(job["checkpoints"]) == 2
    for uri in job["checkpoints"]:
        assert {"merged", "adapter"} <= {entry.name for entry in path_of(uri).iterdir()}
    logged = [json.loads(line) for line in path_of(job["logs"]).read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == list(range(1, 13))
    messages = [log["message"] for line in lines for log in line["logs"]]
    assert any(message.startswith("step 12/12") for message in messages)
    assert messages[-1] == f"training is complete; the model is in {path_of(job['checkpoints'][-1])}/merged"

    answer = api.http.post("/fine_tuning/jobs/estimate", json=config, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    estimate = answer.json()
    for name in ("rows", "tokens", "trained_tokens", "truncated_rows", "invalid_rows"):
        assert estimate["data"][name] == job["data"][name]
    assert estimate["steps"] == 12
    assert estimate["time"]["basis"].startswith("measured on")
    assert estimate["memory"]["fits"] is True


def test_a_full_fine_tuning_on_two_workers_trains(api: Api) -> None:
    custom = {"finetuning_type": "FullFineTuneOptions", "fsdp_cpu_offload": True, "memory_efficient_fsdp_wrap": True}
    config = api.config(
        fine_tuning_options={"custom_training_options": custom, "gradient_accumulation_steps": 2},
        overrides="--nproc_per_node 2",
        logger={"log_type": "wandb", "project": "tests"},
    )
    job_id = api.submit(config)
    messages = api.messages(job_id)
    job = api.job(job_id)
    assert job["status"] == "success", job
    assert job["resources"]["workers"] == 2
    assert any("fsdp_cpu_offload has no effect" in message for message in messages)
    assert any("enable_activation_checkpointing has no effect" in message for message in messages)
    assert any("the W&B run is offline" in message for message in messages)
    assert path_of(job["logs"]).is_dir()
    assert (path_of(job["checkpoints"][0]) / "model.safetensors").exists()


def test_the_same_lines_can_be_read_again_from_any_offset(api: Api, bad_rows: Path) -> None:
    job_id = api.submit(api.config(data=str(bad_rows)))
    everything = [log for line in api.tail(job_id) for log in line["logs"]]
    assert len(everything) >= 2
    for after in range(len(everything) + 1):
        again = [log for line in api.tail(job_id, after=after) for log in line["logs"]]
        assert again == everything[after:]


def test_bad_rows_fail_the_job_with_their_line_numbers_before_it_holds_anything(api: Api, bad_rows: Path) -> None:
    job_id = api.submit(api.config(data=str(bad_rows)))
    job = api.until_status(job_id, "failed")
    assert (job["error"]["code"], job["error"]["fault"]) == ("invalid_data", "user")
    assert (job["error"]["param"], job["error"]["line"], job["error"]["retryable"]) == ("data", 1, False)
    assert [error["line"] for error in job["data"]["errors"]] == [1, 2, 3]
    assert job["attempt"] == 0
    assert "line 1" in path_of(job["error_path"]).read_text()


def test_more_workers_than_the_cluster_can_ever_have_are_refused_at_once(api: Api) -> None:
    answer = api.http.post("/fine_tuning/jobs/submit", json=api.config(overrides=f"--nproc_per_node {CPUS + 1}"))
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == "overrides"
    assert f"{CPUS + 1} workers" in error["message"]


def test_two_jobs_that_need_the_whole_machine_run_one_after_the_other_and_small_ones_do_not_overtake(
    api: Api,
) -> None:
    whole = f"--nproc_per_node {CPUS}"
    first = api.submit(api.endless(overrides=whole))
    api.until_status(first, "running")
    second = api.submit(api.endless(overrides=whole))
    third = api.submit(api.config(overrides="--nproc_per_node 1"))
    waiting = api.until(second, lambda job: "needs 2 CPUs, 0 free" in job.get("why", ""))
    assert waiting["status"] == "queued"
    behind = api.until(third, lambda job: "1 job ahead" in job.get("why", ""))
    assert behind["status"] == "queued"  # small, but it came later

    api.cancel(second)
    api.until_status(second, "cancelled")
    assert api.job(first)["status"] == "running"

    began = time.monotonic()
    api.cancel(first)
    eventually(lambda: not workers_of(api, first), 60, lambda: "workers of a cancelled job live on")
    stopped_s = time.monotonic() - began
    job = api.until_status(first, "cancelled")
    assert stopped_s < 5
    assert job["finished_at"]
    assert api.cancel(first)["status"] == "cancelled"  # again: the same answer
    api.until_status(third, "success")
    eventually(lambda: free_cpus(api) == CPUS, 60, lambda: f"only {free_cpus(api)} CPUs are free")


def test_a_job_can_be_cancelled_while_it_is_being_validated(api: Api) -> None:
    job_id = api.submit(api.config())
    assert api.cancel(job_id)["why"] == "cancelling"
    job = api.until_status(job_id, "cancelled")
    assert job["attempt"] == 0


def test_a_finished_job_cannot_be_cancelled(api: Api, bad_rows: Path) -> None:
    job_id = api.submit(api.config(data=str(bad_rows)))
    api.until_status(job_id, "failed")
    assert api.http.post("/fine_tuning/jobs/cancel", json={"job_id": job_id}).status_code == 409


def test_a_job_is_its_runner_and_its_workers_all_with_its_id_and_cancelled_it_holds_nothing(api: Api) -> None:
    job_id = api.submit(api.endless(overrides=f"--nproc_per_node {CPUS}"))
    api.until_status(job_id, "running")
    jobs = dashboard(api, "/api/jobs/")
    assert any(job["submission_id"] == job_id and job["status"] == "RUNNING" for job in jobs)
    groups = dashboard(api, "/api/v0/placement_groups?detail=1")["data"]["result"]["result"]
    assert any(group["name"] == job_id for group in groups)
    actors = dashboard(api, "/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
    alive = [actor for actor in actors if actor["state"] == "ALIVE"]
    worker = f"RayTrainWorker:{job_id}"
    driver = next(actor["job_id"] for actor in alive if actor["class_name"] == worker)
    assert [actor["class_name"] for actor in alive if actor["job_id"] == driver] == CPUS * [worker]
    assert _train_run(api, job_id)["status"] == "RUNNING"
    applications = dashboard(api, "/api/serve/applications/")["applications"]
    assert applications["tunewright"]["status"] == "RUNNING"
    assert free_cpus(api) == 0

    api.cancel(job_id)
    api.until_status(job_id, "cancelled")
    assert free_cpus(api) == CPUS
    assert workers_of(api, job_id) == []
    eventually(lambda: _train_run(api, job_id)["status"] == "ABORTED", WAIT_S, lambda: str(_train_run(api, job_id)))


def test_a_client_generated_from_the_contract_works_against_the_whole_service(api: Api, tmp_path: Path) -> None:
    assert journey(generate_client(tmp_path), api.service.url, **api.config()) == "cancelled"


def test_the_command_line_asks_the_running_service(api: Api) -> None:
    job_id = api.submit(api.config())
    told = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "TUNEWRIGHT_STORAGE")
    ours = {name: api.service.env[name] for name in told if name in api.service.env}
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    asked = [sys.executable, "-m", "events", "inspect", job_id]
    done = subprocess.run(asked, env=others | ours, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert f'"job_id": "{job_id}"' in done.stdout


@pytest.mark.parametrize("end", ["success", "stopped"])
def test_ray_job_submit_runs_one_job_to_its_end(api: Api, tmp_path: Path, end: str) -> None:
    (tmp_path / "rows.jsonl").write_text(api.data.read_text())
    config = api.config(data="rows.jsonl") if end == "success" else api.endless(data="rows.jsonl")
    (tmp_path / "config.json").write_text(json.dumps(config | {"data": "rows.jsonl"}))
    environment = os.environ | api.service.env | {"RAY_API_SERVER_ADDRESS": api.service.dashboard_url}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job"]
    submission = f"by-hand-{end}"
    command = [*ray, "submit", "--submission-id", submission, "--working-dir", str(tmp_path), "--"]
    with subprocess.Popen(
        [*command, sys.executable, "-m", "trainers", "config.json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as submitting:
        if end == "stopped":
            eventually(lambda: _newest_runs(api), WAIT_S, lambda: "the job does not run")
            subprocess.run([*ray, "stop", submission], env=environment, check=True, capture_output=True)
        output, _ = submitting.communicate(timeout=WAIT_S)
    newest = api.http.get("/fine_tuning/jobs", params={"limit": 1}).json()["data"][0]
    if end == "success":
        assert submitting.returncode == 0, output
        assert "step 3/3" in output
        assert f"{newest['job_id']} succeeded" in output
        assert newest["status"] == "success"
    else:
        api.until_status(newest["job_id"], "cancelled")


def _train_run(api: Api, job_id: str) -> Any:
    """The job's run, as Ray Train's state has it."""
    runs = dashboard(api, "/api/train/v2/runs/v1")["train_runs"]
    return next(run for run in runs if run["name"] == job_id)


def _newest_runs(api: Api) -> bool:
    newest = api.http.get("/fine_tuning/jobs", params={"limit": 1}).json()["data"][0]
    return bool(newest["status"] == "running")

"""A node is lost without notice: its jobs go on on another one, with the losses of an undisturbed run."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from serve_app.local import LocalService
from tests.faults.killing import INTERVAL, UNOWNED_S, Faults, logged, step_of
from tests.service.conftest import Api, workers_of
from tests.service.nodes import another_node, held_by, submit_to
from tests.waiting import eventually


@pytest.mark.timeout(900)
def test_a_job_goes_on_elsewhere_when_its_node_is_lost(tmp_path: Path, inputs: Path) -> None:
    env = {"TUNEWRIGHT_DATA_ROOTS": str(inputs), "TUNEWRIGHT_MODEL_ROOTS": str(inputs), "OMP_NUM_THREADS": "1"}
    with LocalService(tmp_path / "storage", num_cpus=0, env=env) as service, ExitStack() as cluster:
        faults = Faults(Api(service, inputs / "tiny", inputs / "rows.jsonl"))
        lost = cluster.enter_context(another_node(service))
        job_id = submit_to(faults.api, faults.config())
        faults.until(job_id, lambda job: bool(job["checkpoints"]) and step_of(job) > INTERVAL)
        other = cluster.enter_context(another_node(service))
        assert held_by(service, job_id) == {lost.node_id: 1}

        lost.kill()
        eventually(lambda: faults.job(job_id)["status"] != "running", UNOWNED_S, lambda: f"{faults.job(job_id)}")
        job = faults.until(job_id, lambda job: job["attempt"] == 2 and step_of(job) > 0)
        assert job["interruptions"] == 1
        assert held_by(service, job_id) == {other.node_id: 1}
        assert len(workers_of(faults.api, job_id)) == 1
        job = faults.until(job_id, lambda job: job["status"] not in ("validation", "queued", "running"))
        assert job["status"] == "success", job
        undisturbed = faults.until(faults.submit(), lambda job: job["status"] == "success")
        assert logged(job) == logged(undisturbed)

"""A deploy brings its settings to all that runs: the API, the dispatcher, and the runners that it starts."""

import shutil
from pathlib import Path

import pytest

from serve_app.local import HOST, LocalService, serve_config
from tests.service.conftest import Api, local_service
from tests.waiting import WAIT_S, eventually


def deploy(service: LocalService, **settings: str) -> None:
    """`serve deploy` of serve.yaml with these settings in it; returns once the API of that deploy serves."""
    config = serve_config()
    config["http_options"] |= {"host": HOST, "port": int(service.url.rpartition(":")[2])}
    config["applications"][0]["runtime_env"] = {"env_vars": settings}
    answer = service._dashboard("PUT", "/api/serve/applications/", json=config)
    assert answer.is_success, answer.text

    def deployed() -> bool:
        (application,) = service._applications().values()
        assert application["status"] != "DEPLOY_FAILED", application
        return bool(
            application["status"] == "RUNNING"
            and application["deployed_app_config"]["runtime_env"]["env_vars"] == settings
        )

    eventually(deployed, WAIT_S, lambda: f"it is not deployed: {service._applications()}")


@pytest.mark.timeout(600)  # each wait has a limit of its own
def test_a_root_that_a_deploy_adds_is_one_for_the_jobs_that_are_submitted_then(tmp_path: Path, inputs: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(inputs / "rows.jsonl", elsewhere)
    with local_service(tmp_path / "storage", inputs) as service:
        api = Api(service, inputs / "tiny", elsewhere / "rows.jsonl")
        refused = api.http.post("/fine_tuning/jobs/submit", json=api.config())
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "path_outside_roots"), refused.text
        (before,) = api.processes("DispatcherActor")

        deploy(service, TUNEWRIGHT_DATA_ROOTS=f"{inputs}:{elsewhere}")
        eventually(lambda: not before.is_running(), WAIT_S, lambda: "the dispatcher stays")
        job_id = api.submit(api.config())
        job = api.until(job_id, lambda job: job["status"] != "validation")
        assert job["data"]["rows"] == 24, job
        api.cancel(job_id)
        api.until_status(job_id, "cancelled")

"""The whole service on a Ray cluster of its own, and the tests' way of talking to it: HTTP, as a user would."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve_app.local import LocalService
from tests.tiny_models import make_tiny_model
from tests.waiting import WAIT_S, eventually

CPUS = 2
FP32: dict[str, Any] = {"n_epochs": 10_000, "lr": 0.01, "extras": {"dtype": "fp32"}}
"""Options of a run that doesn't end by itself, learns fast, and has the same losses each time."""


class Api:
    """A client of the service's HTTP API, and the requests that the tests submit."""

    def __init__(self, service: LocalService, model: Path, data: Path) -> None:
        self.service = service
        self.model = model
        self.data = data
        self.http = httpx.Client(base_url=service.url, timeout=30, trust_env=False)

    def config(self, **changes: Any) -> dict[str, Any]:
        return {"model": str(self.model), "data": str(self.data)} | changes

    def endless(self, **changes: Any) -> dict[str, Any]:
        """The request for a job that runs until it is stopped."""
        options = {"n_epochs": 10_000, "extras": {"save_every_n_steps": 20}}
        return self.config(fine_tuning_options=options, **changes)

    def submit(self, config: dict[str, Any], headers: dict[str, str] | None = None) -> str:
        answer = self.http.post("/fine_tuning/jobs/submit", json=config, headers=headers)
        assert answer.status_code == 200, answer.text
        job_id: str = answer.json()["job_id"]
        return job_id

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get("/fine_tuning/jobs/status", params={"job_id": job_id})
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def cancel(self, job_id: str) -> dict[str, Any]:
        answer = self.http.post("/fine_tuning/jobs/cancel", json={"job_id": job_id})
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def tail(self, job_id: str, **parameters: Any) -> list[dict[str, Any]]:
        """Every line of the stream, to its end."""
        parameters = {"job_id": job_id} | parameters
        with self.http.stream("GET", "/fine_tuning/jobs/tail", params=parameters, timeout=WAIT_S) as stream:
            assert stream.headers["content-type"] == "application/x-ndjson"
            return [json.loads(line) for line in stream.iter_lines()]

    def processes(self, *words: str) -> list[psutil.Process]:
        """The service's processes with all these words in their titles, which Ray sets."""
        return [process for process in self.service.processes() if all(word in title(process) for word in words)]

    def messages(self, job_id: str) -> list[str]:
        return [log["message"] for line in self.tail(job_id) for log in line["logs"]]

    def until(
        self, job_id: str, condition: Callable[[dict[str, Any]], bool], timeout_s: float = WAIT_S
    ) -> dict[str, Any]:
        """The job, as soon as the condition holds for it."""
        job: dict[str, Any] = {}

        def holds() -> bool:
            nonlocal job
            job = self.job(job_id)
            return condition(job)

        eventually(holds, timeout_s, lambda: f"the job stays {json.dumps(job)}")
        return job

    def until_status(self, job_id: str, *statuses: str) -> dict[str, Any]:
        job = self.until(job_id, lambda job: job["status"] in {*statuses, "failed", "success", "cancelled"})
        assert job["status"] in statuses, job
        return job


def title(process: psutil.Process) -> str:
    """The command line of a process; empty if it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def path_of(uri: str) -> Path:
    assert uri.startswith("file:///"), uri
    return Path(uri.removeprefix("file://"))


def losses(job: dict[str, Any]) -> dict[int, float]:
    """The losses by step, from the job's metrics file. A step that was trained twice fails the test."""
    entries = [json.loads(line) for line in path_of(job["logs"]).read_text().splitlines()]
    steps = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    assert len(dict(steps)) == len(steps)
    return dict(steps)


def step_of(job: dict[str, Any]) -> int:
    return int(job.get("progress", {}).get("step", 0))


def workers_of(api: Api, job_id: str) -> list[psutil.Process]:
    """The training processes of a job: every one of their titles carries the job's id."""
    return api.processes("RayTrainWorker", job_id)


def dashboard(api: Api, path: str) -> Any:
    """The dashboard's answer, asked again until there is one: on a busy machine its state API times out."""
    found: list[Any] = []

    def answers() -> bool:
        answer = httpx.get(api.service.dashboard_url + path, timeout=30, trust_env=False)
        good = answer.is_success and answer.headers["content-type"].startswith("application/json")
        found.append(answer.json() if good else f"{answer.status_code} {answer.text[:2000]}")
        return good

    eventually(answers, WAIT_S, lambda: f"the dashboard doesn't answer {path}: {found[-1]}")
    return found[-1]


def free_cpus(api: Api) -> float:
    """The CPUs that are free, by Ray's own count."""
    nodes = dashboard(api, "/api/v0/nodes?detail=1")["data"]["result"]["result"]
    total: float = sum(node["resources_total"].get("CPU", 0) for node in nodes if node["state"] == "ALIVE")
    groups = dashboard(api, "/api/v0/placement_groups?detail=1")["data"]["result"]["result"]
    held: float = sum(
        bundle["unit_resources"].get("CPU", 0)
        for group in groups
        if group["state"] == "CREATED"
        for bundle in group["bundles"]
    )
    return total - held


def make_inputs(directory: Path, rows: int, answer: str) -> Path:
    """Makes a tiny model (`tiny`) and data (`rows.jsonl`) in the directory. `{0}` in the answer is the row's number."""
    make_tiny_model(directory / "tiny")
    dialogs = [
        [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": answer.format(i)}]
        for i in range(rows)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps({"dialog": dialog}) + "\n" for dialog in dialogs))
    return directory


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model (`tiny`) and data (`rows.jsonl`)."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), 24, "It is {0}.")


@pytest.fixture(scope="session")
def bad_rows(inputs: Path) -> Path:
    """Three lines, each wrong in its own way."""
    rows = ['{"dialog": []}', "not JSON", json.dumps({"dialog": [{"role": "user", "content": "hi"}]})]
    path = inputs / "bad.jsonl"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


def local_service(storage: Path, inputs: Path, **changes: str) -> LocalService:
    """A local service for tests; `changes` are settings."""
    env = {
        "TUNEWRIGHT_DATA_ROOTS": str(inputs),
        "TUNEWRIGHT_MODEL_ROOTS": str(inputs),
        "TUNEWRIGHT_HEARTBEAT_S": "1",
        "TUNEWRIGHT_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "TUNEWRIGHT_CHAT_IDLE_S": "15",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
    }
    return LocalService(storage, num_cpus=CPUS, env=env | changes)


@pytest.fixture(scope="session")
def api(storage: Path, inputs: Path) -> Iterator[Api]:
    with local_service(storage, inputs) as service:
        yield Api(service, inputs / "tiny", inputs / "rows.jsonl")


@pytest.fixture(autouse=True)
def no_job_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cancels the jobs that a failed test leaves: they would hold CPUs that the tests after it need."""
    yield
    if "api" not in request.fixturenames:
        return
    api: Api = request.getfixturevalue("api")
    for job in api.http.get("/fine_tuning/jobs", params={"limit": 100}).json()["data"]:
        if job["status"] in ("validation", "queued", "running"):
            api.http.post("/fine_tuning/jobs/cancel", json={"job_id": job["job_id"]})
            api.until_status(job["job_id"], "cancelled", "failed", "success")

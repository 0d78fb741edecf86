"""The client of the examples, against a running API."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from events.facts import CancelRequested, JobCancelled
from events.job import FineTuningJob
from events.log import EventLog, LogUnavailable
from examples import client
from examples.client import ApiError, Client
from tests.events.facts_of_a_job import WORKER_DIED
from tests.ports import free_ports
from tests.serve_app.live_server import Parts, Serve, Server
from trainers.settings import Settings


class Restarting(Parts):
    """Its log can't be reached when it is asked for a job the first time."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.asked = 0
        log: EventLog = self.log
        job = log.job

        async def sometimes(job_id: str) -> FineTuningJob:
            self.asked += 1
            if self.asked == 1:
                raise LogUnavailable("restarting")
            return await job(job_id)

        log.job = sometimes  # type: ignore[method-assign]


@pytest.fixture
def restarting(serve: Serve) -> Server:
    return serve(parts_type=Restarting)


def test_following_a_job_outlasts_a_restart_of_the_service(restarting: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RECONNECT_S", 0.01)
    job_id = Client(restarting.url).submit(restarting.config())["job_id"]
    restarting.print(job_id, "one", "two")
    restarting.append(job_id, WORKER_DIED)
    first = httpx.get(f"{restarting.url}/fine_tuning/jobs/tail", params={"job_id": job_id})
    assert first.status_code == 503
    assert isinstance(restarting.parts, Restarting)
    restarting.parts.asked = 0
    assert [line["message"] for line in Client(restarting.url).tail(job_id)] == ["one", "two"]


def test_a_service_that_is_not_there_is_said_in_words() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    command = [sys.executable, "-m", "examples.client", url, "examples/tickets/job.json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"{url} doesn't answer: [Errno 111] Connection refused"]


def test_following_a_job_that_is_not_there_is_refused(server: Server) -> None:
    with pytest.raises(ApiError) as caught:
        list(Client(server.url).tail("ftjob-none"))
    assert caught.value.status == 404


class _KnowsNoPath(httpx.HTTPTransport):
    """A proxy in front of the service that has heard nothing of it when it is asked the first time."""

    asked = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        return httpx.Response(404, text="Path not found") if self.asked == 1 else super().handle_request(request)


def test_following_a_job_outlasts_a_proxy_that_does_not_know_the_service_yet(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RECONNECT_S", 0.01)
    job_id = server.submit()
    server.print(job_id, "one")
    server.append(job_id, CancelRequested(), JobCancelled())
    follower = Client(server.url)
    follower._http = httpx.Client(base_url=server.url, transport=_KnowsNoPath())
    assert [line["message"] for line in follower.tail(job_id)] == ["one"]


def test_a_gateway_that_refuses_ends_what_follows_a_job() -> None:
    follower = Client("http://gateway")
    refuses = httpx.MockTransport(lambda _: httpx.Response(401, text="<html>who are you?</html>"))
    follower._http = httpx.Client(base_url="http://gateway", transport=refuses)
    with pytest.raises(ApiError) as caught:
        list(follower.tail("ftjob-1"))
    assert caught.value.status == 401

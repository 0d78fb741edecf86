"""A submit that is sent again makes no second job, with or without an Idempotency-Key. Two submits make two."""

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from events.facts import JobSubmitted, Resources
from events.job import FineTuningJob
from events.log import EventLog
from tests.serve_app.live_server import MODEL, Parts, Serve, Server
from tests.waiting import eventually
from trainers.models.architecture import Architecture
from trainers.planning.plan import Plan
from trainers.settings import Settings

SUBMIT = "/fine_tuning/jobs/submit"


class _Gated(Parts):
    """Each submit waits at the gate, while it is closed."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.open = asyncio.Event()
        self.open.set()
        self.arrived = threading.Semaphore(0)

    async def resources(self, plan: Plan, architecture: Architecture | None) -> Resources:
        self.arrived.release()
        await self.open.wait()
        return await super().resources(plan, architecture)

    async def shut(self) -> None:
        self.open.clear()

    async def unlock(self) -> None:
        self.open.set()


@pytest.fixture(scope="module")
def gated(serve: Serve) -> Server:
    return serve(_Gated)


@pytest.fixture
def api(gated: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gated.url, timeout=30) as client:
        yield client


def request_body(server: Server, name: str) -> dict[str, Any]:
    """A good request, another for each test."""
    return server.config(metadata={"test": name})


def jobs_of(api: httpx.Client, body: dict[str, Any]) -> list[str]:
    page = api.get("/fine_tuning/jobs", params={"limit": 100}).json()["data"]
    return [job["job_id"] for job in page if job["input_config"] == body]


def submit_and_hang_up(gated: Server, api: httpx.Client, body: dict[str, Any], *headers: str) -> str:
    """The request arrives, its sender hangs up, then the job is made. Returns its id."""
    parts = gated.parts
    assert isinstance(parts, _Gated)
    while parts.arrived.acquire(blocking=False):
        pass
    gated.do(parts.shut())
    content = json.dumps(body).encode()
    host, port = gated.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        lines = ["Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}", *headers]
        connection.sendall("\r\n".join([f"POST {SUBMIT} HTTP/1.1", *lines, "", ""]).encode() + content)
        assert parts.arrived.acquire(timeout=30)
    api.get("/healthz")  # the server has looked at its connections since
    gated.do(parts.unlock())
    (made,) = eventually(lambda: jobs_of(api, body), 30, lambda: "the job is not made")
    return made


def test_a_submit_whose_sender_hung_up_before_the_answer_may_be_sent_again(gated: Server, api: httpx.Client) -> None:
    body = request_body(gated, "hang up")
    first = submit_and_hang_up(gated, api, body)
    assert api.post(SUBMIT, json=body).json()["job_id"] == first
    assert jobs_of(api, body) == [first]


def test_once_the_second_try_was_answered_the_next_submit_is_another_job(gated: Server, api: httpx.Client) -> None:
    body = request_body(gated, "answered")
    first = submit_and_hang_up(gated, api, body)
    assert api.post(SUBMIT, json=body).json()["job_id"] == first
    assert api.post(SUBMIT, json=body).json()["job_id"] != first


def test_the_same_request_of_another_caller_is_another_job(gated: Server, api: httpx.Client) -> None:
    body = request_body(gated, "other caller")
    first = submit_and_hang_up(gated, api, body, "Authorization: Bearer one")
    others = [{"Authorization": "Bearer two"}, {"X-Forwarded-For": "10.0.0.7"}, {}]
    ids = {api.post(SUBMIT, json=body, headers=headers).json()["job_id"] for headers in others}
    assert len(ids - {first}) == 3
    assert api.post(SUBMIT, json=body, headers={"Authorization": "Bearer one"}).json()["job_id"] == first


def test_another_request_of_the_same_caller_is_another_job(gated: Server, api: httpx.Client) -> None:
    body = request_body(gated, "other request")
    first = submit_and_hang_up(gated, api, body)
    other = body | {"fine_tuning_options": {"n_epochs": 3}}
    assert api.post(SUBMIT, json=other).json()["job_id"] != first


def test_two_identical_submits_that_were_answered_are_two_jobs(
    gated: Server, api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast the second one follows, on whatever connection, and however late the log hears of the first."""
    log = gated.parts.log
    answered = log.answered

    async def late(job_id: str) -> None:
        await asyncio.sleep(1)
        await answered(job_id)

    monkeypatch.setattr(log, "answered", late)
    body = request_body(gated, "twice")
    with httpx.Client(base_url=gated.url, timeout=30) as other:
        ids = {client.post(SUBMIT, json=body).json()["job_id"] for client in (api, other, other)}
    assert len(ids) == 3


def test_identical_submits_at_the_same_moment_are_one_request_sent_twice(gated: Server, api: httpx.Client) -> None:
    parts = gated.parts
    assert isinstance(parts, _Gated)
    body = request_body(gated, "at once")
    while parts.arrived.acquire(blocking=False):
        pass
    gated.do(parts.shut())
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(httpx.post, gated.url + SUBMIT, json=body, timeout=60) for _ in range(4)]
        for _ in range(4):
            assert parts.arrived.acquire(timeout=30)
        gated.do(parts.unlock())
        ids = {answer.result().json()["job_id"] for answer in answers}
    assert sorted(ids) == sorted(jobs_of(api, body))
    assert len(ids) == 1


@pytest.mark.parametrize(("count", "same"), [("1", True), ("12", True), ("0", False), ("-1", False), ("x", False)])
def test_a_client_that_says_it_retries_gets_the_same_job(
    gated: Server, api: httpx.Client, count: str, same: bool
) -> None:
    """Its answer may have been lost after it was delivered: on the way from a gateway, say."""
    body = request_body(gated, f"retry {count}")
    first = api.post(SUBMIT, json=body).json()["job_id"]
    again = api.post(SUBMIT, json=body, headers={"x-stainless-retry-count": count}).json()["job_id"]
    assert (again == first) == same


def test_a_retry_with_the_key_gets_its_job_also_when_the_data_is_gone(gated: Server, api: httpx.Client) -> None:
    rows = gated.parts.settings.storage / "once.jsonl"
    rows.write_text(json.dumps({"dialog": [{"role": "assistant", "content": "hi"}]}) + "\n")
    body = gated.config(data=str(rows), validation_data=None)
    headers = {"Idempotency-Key": "data that goes"}
    first = api.post(SUBMIT, json=body, headers=headers).json()
    rows.unlink()
    assert api.post(SUBMIT, json=body, headers=headers).json() == first
    other = api.post(SUBMIT, json=body | {"metadata": {"other": True}}, headers=headers)
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert api.post(SUBMIT, json=body, headers={"Idempotency-Key": "new"}).json()["error"]["param"] == "data"


class _Killed(EventLog):
    """Its process is killed between the append and the answer."""

    async def submit(
        self, job_id: str, event: JobSubmitted, event_id: str, max_live_jobs: int, *, retried: bool = False
    ) -> FineTuningJob:
        await super().submit(job_id, event, event_id, max_live_jobs, retried=retried)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def serve_until_killed(settings: Settings, url: "multiprocessing.Queue[str]") -> None:
    parts = Parts(settings)
    parts.log.__class__ = _Killed
    url.put(Server(parts).url)
    threading.Event().wait()


def test_a_server_killed_between_the_append_and_the_answer_has_made_one_job(tmp_path: Path) -> None:
    settings = Settings(storage=tmp_path, data_roots=(tmp_path,))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"dialog": [{"role": "assistant", "content": "hi"}]}) + "\n")
    body = {"model": MODEL, "data": str(tmp_path / "rows.jsonl")}
    context = multiprocessing.get_context("spawn")
    urls: multiprocessing.Queue[str] = context.Queue()
    process = context.Process(target=serve_until_killed, args=(settings, urls), daemon=True)
    process.start()
    with pytest.raises(httpx.TransportError):
        httpx.post(urls.get(timeout=120) + SUBMIT, json=body, timeout=60)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL

    server = Server(Parts(settings))
    try:
        with httpx.Client(base_url=server.url, timeout=30) as api:
            (first,) = jobs_of(api, body)
            assert api.post(SUBMIT, json=body).json()["job_id"] == first
            assert jobs_of(api, body) == [first]
            assert api.post(SUBMIT, json=body).json()["job_id"] != first
    finally:
        server.stop()

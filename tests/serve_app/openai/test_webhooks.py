"""/v1/webhook_endpoints through the real client, and what our own routes add to it."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from events.facts import CancelRequested, JobCancelled
from tests.ports import free_ports
from tests.serve_app.live_server import Parts, Serve, Server
from tests.serve_app.openai.conftest import connected
from tests.waiting import eventually
from tests.webhook_receiver import Receiver, verified
from trainers.settings import Settings

TYPES: Any = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
HOUR = 3600


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    return serve(webhook_networks="127.0.0.0/8")


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/v1", timeout=30) as client:
        yield client


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def endpoint(client: openai.OpenAI, receiver: Receiver) -> Iterator[Any]:
    """An endpoint with its secret."""
    created = client.webhooks.create(name="mine", url=receiver.url, event_types=TYPES)
    yield created
    client.webhooks.delete(created.id)


@pytest.fixture
def cancelled(server: Server, create: Callable[..., Any]) -> Callable[[], str]:
    """Makes a job that is cancelled, and returns its id."""

    def cancelled() -> str:
        job_id: str = create().id
        server.append(job_id, CancelRequested(), JobCancelled())
        return job_id

    return cancelled


def delivered(http: httpx.Client, endpoint_id: str, count: int) -> list[dict[str, Any]]:
    """The newest deliveries, once there are `count` and all have arrived."""
    data: list[dict[str, Any]] = []

    def all_delivered() -> bool:
        data[:] = http.get(f"/webhook_endpoints/{endpoint_id}/deliveries", params={"limit": 100}).json()["data"]
        return [one["status"] for one in data] == ["delivered"] * count

    eventually(all_delivered, 60, lambda: f"the deliveries stay {data}")
    return data


def test_the_client_creates_lists_updates_and_deletes_endpoints(client: openai.OpenAI, receiver: Receiver) -> None:
    made = [client.webhooks.create(name=f"{n}", url=receiver.url, event_types=TYPES[:1]) for n in range(3)]
    assert [one.id for one in client.webhooks.list(limit=2)] == [one.id for one in reversed(made)]
    first = client.webhooks.retrieve(made[0].id)
    assert (first.name, first.url, first.event_types, first.object) == (
        "0",
        receiver.url,
        TYPES[:1],
        "webhook_endpoint",
    )
    assert abs(first.created_at - time.time()) < HOUR
    changed = client.webhooks.update(first.id, name="new", event_types=TYPES)
    assert (changed.name, changed.url, changed.event_types) == ("new", receiver.url, TYPES)
    for one in made:
        assert client.webhooks.delete(one.id).deleted
    assert list(client.webhooks.list()) == []
    with pytest.raises(openai.NotFoundError, match="no webhook endpoint"):
        client.webhooks.retrieve(first.id)
    assert client.webhooks.event_types.list().data == TYPES


def test_the_secret_is_shown_once(client: openai.OpenAI, http: httpx.Client, endpoint: Any) -> None:
    secret = endpoint.signing_secret
    assert secret.startswith("whsec_")
    rotated = client.webhooks.rotate_secret(endpoint.id)
    assert rotated.signing_secret != secret
    for path in ("", f"/{endpoint.id}", f"/{endpoint.id}/deliveries"):
        text = http.get(f"/webhook_endpoints{path}").text
        assert secret not in text
        assert rotated.signing_secret not in text
    hint = client.webhooks.retrieve(endpoint.id).signing_secret_hint
    assert hint == f"whsec_...{rotated.signing_secret[-4:]}"


def test_a_rotation_that_is_sent_again_leaves_the_receiver_the_secret_it_has(
    client: openai.OpenAI, http: httpx.Client, endpoint: Any, receiver: Receiver, cancelled: Callable[[], str]
) -> None:
    for _ in range(2):
        client.webhooks.rotate_secret(endpoint.id, keep_old_secret_active_for_24_hours=True)
    cancelled()
    delivered(http, endpoint.id, 1)
    assert verified(receiver.got[0], endpoint.signing_secret).type == "fine_tuning.job.cancelled"


def test_a_create_that_is_sent_again_with_its_idempotency_key_makes_one_endpoint(
    client: openai.OpenAI, receiver: Receiver
) -> None:
    def create(**changes: Any) -> Any:
        asked = {"name": "once", "url": receiver.url, "event_types": TYPES[:1], **changes}
        return client.webhooks.create(**asked, extra_headers={"Idempotency-Key": "only once"})

    first, again = create(), create()
    assert again == first
    assert again.signing_secret.startswith("whsec_")
    assert [endpoint.id for endpoint in client.webhooks.list() if endpoint.name == "once"] == [first.id]
    with pytest.raises(openai.BadRequestError) as refused:
        create(name="twice")
    assert (refused.value.code, refused.value.param) == ("idempotency_key_reused", "Idempotency-Key")
    client.webhooks.delete(first.id)


def test_the_client_unwraps_what_a_receiver_gets(
    http: httpx.Client, endpoint: Any, receiver: Receiver, cancelled: Callable[[], str]
) -> None:
    job_id = cancelled()
    (delivery,) = delivered(http, endpoint.id, 1)
    (got,) = receiver.got
    event = verified(got, endpoint.signing_secret)
    assert type(event).__name__ == "FineTuningJobCancelledWebhookEvent"
    assert (event.id, event.data.id) == (delivery["id"], job_id)
    assert delivery == {
        "id": event.id,
        "object": "webhook_endpoint.delivery",
        "created_at": event.created_at,
        "event_type": "fine_tuning.job.cancelled",
        "job_id": job_id,
        "status": "delivered",
        "attempts": 1,
        "last_attempt_at": delivery["last_attempt_at"],
        "next_attempt_at": None,
        "last_status_code": 200,
        "last_error": None,
    }


def test_deliveries_are_paged_and_sent_again_on_demand(
    http: httpx.Client, endpoint: Any, receiver: Receiver, cancelled: Callable[[], str]
) -> None:
    jobs = [cancelled() for _ in range(3)]
    all_three = delivered(http, endpoint.id, 3)
    assert [one["job_id"] for one in all_three] == jobs[::-1]
    path = f"/webhook_endpoints/{endpoint.id}/deliveries"
    page = http.get(path, params={"limit": 2}).json()
    assert (page["data"], page["has_more"], page["last_id"]) == (all_three[:2], True, all_three[1]["id"])
    rest = http.get(path, params={"limit": 2, "after": page["last_id"]}).json()
    assert (rest["data"], rest["has_more"]) == (all_three[2:], False)
    again = http.post(f"{path}/{all_three[2]['id']}/redeliver")
    assert (again.status_code, again.json()["status"], again.json()["attempts"]) == (200, "pending", 0)
    delivered(http, endpoint.id, 3)
    assert sorted(verified(got, endpoint.signing_secret).data.id for got in receiver.got) == sorted([*jobs, jobs[0]])


def test_a_test_event_says_how_the_endpoint_answers(client: openai.OpenAI) -> None:
    with Receiver(lambda _: 503) as receiver:
        created = client.webhooks.create(name="x", url=receiver.url, event_types=TYPES)
        result = client.webhooks.test(created.id, event_type="fine_tuning.job.failed")
        assert (result.status_code, result.success, result.webhook_endpoint_id) == (503, True, created.id)
        (got,) = receiver.got
        assert verified(got, created.signing_secret).data.id == "ftjob-test"
    with pytest.raises(openai.BadRequestError, match="can't be reached: no connection"):
        client.webhooks.test(created.id, event_type="fine_tuning.job.failed")
    client.webhooks.delete(created.id)


def test_the_receiver_of_the_documentation_works(
    client: openai.OpenAI, http: httpx.Client, cancelled: Callable[[], str], tmp_path: Path
) -> None:
    documented = (Path(__file__).parents[3] / "docs" / "webhooks.md").read_text()
    (port,) = free_ports(1)
    (program,) = [code for code in re.findall(r"```python\n(.*?)```", documented, re.DOTALL) if "9000" in code]
    (tmp_path / "receiver.py").write_text(program.replace("9000", str(port)))
    hook = client.webhooks.create(name="x", url=f"http://127.0.0.1:{port}/", event_types=TYPES)
    environment = {**os.environ, "WEBHOOK_SECRET": hook.signing_secret}
    command = [sys.executable, "-u", str(tmp_path / "receiver.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as receiver:
        try:
            eventually(lambda: is_listening(port), 60, lambda: "the receiver does not start")
            job_id = cancelled()
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == f"fine_tuning.job.cancelled {job_id}\n"
            delivered(http, hook.id, 1)
            assert httpx.post(f"http://127.0.0.1:{port}/", json={}).status_code == 400
        finally:
            receiver.kill()
    client.webhooks.delete(hook.id)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/", "http://169.254.169.254/latest", "https://[::1]/", "ftp://8.8.8.8/"]
)
def test_a_url_that_may_not_be_sent_to_is_a_400_that_says_why(client: openai.OpenAI, endpoint: Any, url: str) -> None:
    for attempt in (
        lambda: client.webhooks.create(name="x", url=url, event_types=TYPES),
        lambda: client.webhooks.update(endpoint.id, url=url),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            attempt()
        assert (refused.value.param, refused.value.code) == ("url", "webhook_url_refused")
        assert "not public" in refused.value.message or "http or https" in refused.value.message
    assert len(list(client.webhooks.list())) == 1


@pytest.mark.parametrize(
    "changes",
    [{"event_types": []}, {"event_types": ["batch.completed"]}, {"name": ""}, {"url": "x" * 2049}, {"secret": "mine"}],
)
def test_a_request_that_is_wrong_is_a_400(client: openai.OpenAI, receiver: Receiver, changes: dict[str, Any]) -> None:
    good = {"name": "x", "url": receiver.url, "event_types": TYPES}
    with pytest.raises(openai.BadRequestError):
        client.post("/webhook_endpoints", body=good | changes, cast_to=httpx.Response)


def test_the_next_page_comes_also_after_an_endpoint_that_was_deleted_meanwhile(
    client: openai.OpenAI, receiver: Receiver
) -> None:
    """Whether the service chose the endpoint's id itself, or made it of the request's Idempotency-Key."""
    made = []
    for headers in ({}, {"Idempotency-Key": "first"}, {}, {"Idempotency-Key": "second"}):
        created = client.webhooks.create(name="x", url=receiver.url, event_types=TYPES, extra_headers=headers)
        made.append(created.id)
    listed = []
    for endpoint in client.webhooks.list(limit=1):
        listed.append(endpoint.id)
        client.webhooks.delete(endpoint.id)
    assert listed == made[::-1]


def test_what_is_not_there_is_a_404(http: httpx.Client, endpoint: Any) -> None:
    for method, path in (
        ("GET", "/we_none"),
        ("DELETE", "/we_none"),
        ("GET", "/we_none/deliveries"),
        ("POST", f"/{endpoint.id}/deliveries/evt_none/redeliver"),
        ("GET", f"/{endpoint.id}/deliveries?after=evt_none"),
        ("GET", "?after=we_none"),
    ):
        answer = http.request(method, f"/webhook_endpoints{path}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error"), path


class WithoutWebhooks(Parts):
    """The file of endpoints can't be opened."""

    def __init__(self, settings: Settings) -> None:
        settings.webhooks.mkdir()
        super().__init__(settings)


def test_endpoints_that_cannot_be_read_are_a_503_and_hurt_nothing_else(serve: Serve) -> None:
    broken = serve(WithoutWebhooks)
    answer = httpx.get(f"{broken.url}/v1/webhook_endpoints")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "webhooks_unavailable")
    assert "Retry-After" in answer.headers
    with connected(broken) as client:
        assert list(client.fine_tuning.jobs.list()) == []
    broken.stop()  # or it would look for them, and say so, beside all tests that follow

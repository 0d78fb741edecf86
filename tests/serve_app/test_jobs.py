"""Status, list, cancel, health, and what every response has in common."""

import logging
from collections.abc import Callable

import httpx
import pytest
from ray.exceptions import ActorDiedError

from events.facts import CancelRequested, JobCancelled, Resources
from events.job import FineTuningJob
from events.log import EventLog, LogUnavailable
from tests.events.facts_of_a_job import WORKER_DIED
from tests.serve_app.live_server import Parts, Serve, Server
from trainers.models.architecture import Architecture
from trainers.planning.plan import Plan
from trainers.settings import Settings

STATUS = "/fine_tuning/jobs/status"
CANCEL = "/fine_tuning/jobs/cancel"


def test_status_is_the_job_as_its_events_tell_it(
    http: httpx.Client, server: Server, submit: Callable[..., str]
) -> None:
    job_id = submit()
    server.append(job_id, WORKER_DIED)
    job = http.get(STATUS, params={"job_id": job_id}).json()
    assert job["status"] == "failed"
    assert job["error"]["fault"] == "infrastructure"
    assert "finished_at" in job


def test_a_job_that_waits_says_why(http: httpx.Client, server: Server, submit: Callable[..., str]) -> None:
    job_id = submit()
    server.parts.waiting[job_id] = "needs 2 CPUs, 1 free"
    assert http.get(STATUS, params={"job_id": job_id}).json()["why"] == "needs 2 CPUs, 1 free"
    listed = http.get("/fine_tuning/jobs", params={"limit": 1}).json()["data"][0]
    assert listed["why"] == "needs 2 CPUs, 1 free"


def test_a_job_that_no_longer_waits_does_not_say_why(
    http: httpx.Client, server: Server, submit: Callable[..., str]
) -> None:
    job_id = submit()
    server.parts.waiting[job_id] = "a moment ago"
    server.append(job_id, WORKER_DIED)
    assert "why" not in http.get(STATUS, params={"job_id": job_id}).json()


def test_a_cancel_is_recorded_and_answers_with_the_job(
    http: httpx.Client, server: Server, submit: Callable[..., str]
) -> None:
    job_id = submit()
    answer = http.post(CANCEL, json={"job_id": job_id})
    assert answer.status_code == 200
    assert answer.json()["cancel_requested"]
    assert isinstance(server.do(server.parts.log.read(job_id))[-1].event, CancelRequested)


def test_cancelling_twice_is_cancelling_once(http: httpx.Client, server: Server, submit: Callable[..., str]) -> None:
    job_id = submit()
    answers = [http.post(CANCEL, json={"job_id": job_id}) for _ in range(2)]
    server.append(job_id, JobCancelled())
    answers.append(http.post(CANCEL, json={"job_id": job_id}))
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert answers[-1].json()["status"] == "cancelled"
    assert len(server.do(server.parts.log.read(job_id))) == 3


def test_cancelling_a_job_that_has_failed_is_a_conflict(
    http: httpx.Client, server: Server, submit: Callable[..., str]
) -> None:
    job_id = submit()
    server.append(job_id, WORKER_DIED)
    answer = http.post(CANCEL, json={"job_id": job_id})
    assert answer.status_code == 409
    assert answer.json()["error"]["type"] == "conflict_error"


def test_pages_walk_through_all_jobs_newest_first(http: httpx.Client, submit: Callable[..., str]) -> None:
    _, *submitted = [submit() for _ in range(7)]
    seen: list[str] = []
    after: dict[str, str] = {}
    while len(seen) < 6:
        page = http.get("/fine_tuning/jobs", params={"limit": 2, **after}).json()
        assert page["object"] == "list"
        assert page["has_more"]  # the first one submitted, at least
        seen += [job["job_id"] for job in page["data"]]
        after = {"after": seen[-1]}
    assert seen == submitted[::-1]


def test_the_last_page_has_no_more(serve: Serve) -> None:
    assert httpx.get(serve().url + "/fine_tuning/jobs").json() == {"object": "list", "data": [], "has_more": False}


def test_healthz_says_ok_while_the_log_answers(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}


class _Lost(EventLog):
    """An event log that can't be reached."""

    async def jobs(self, limit: int, after: str | None = None) -> tuple[list[FineTuningJob], bool]:
        raise LogUnavailable("the actor has died")

    async def job_json(self, job_id: str) -> bytes:
        raise LogUnavailable("the actor has died")


class _Broken(Parts):
    """Its log can't be reached, and its dispatcher has a bug."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.log.__class__ = _Lost

    async def resources(self, plan: Plan, architecture: Architecture | None) -> Resources:
        raise RuntimeError("password=hunter2")


@pytest.fixture(scope="module")
def broken(serve: Serve) -> Server:
    return serve(_Broken)


@pytest.mark.parametrize("route", ["/healthz", "/fine_tuning/jobs", "/fine_tuning/jobs/status?job_id=x"])
def test_a_log_that_can_not_be_reached_is_a_503(broken: Server, route: str) -> None:
    answer = httpx.get(broken.url + route)
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "service_unavailable_error"
    assert "retry-after" in answer.headers


def test_a_bug_is_a_500_whose_traceback_only_the_operator_sees(
    broken: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "tunewright.serve"):
        answer = httpx.post(broken.url + "/fine_tuning/jobs/submit", json=broken.config())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "hunter2" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] in caplog.text
    assert "hunter2" in caplog.text


class _Headless(Parts):
    """Its dispatcher has died."""

    async def whys(self) -> dict[str, str]:
        raise ActorDiedError


def test_a_dispatcher_that_has_died_is_a_503(serve: Serve) -> None:
    answer = httpx.get(serve(_Headless).url + "/fine_tuning/jobs")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "dispatcher_unavailable"


@pytest.mark.parametrize("route", ["/healthz", "/nope", "/fine_tuning/jobs?limit=0", "/docs", "/openapi.json"])
def test_every_response_has_an_id_and_forbids_sniffing(http: httpx.Client, route: str) -> None:
    headers = http.get(route).headers
    assert headers["x-request-id"]
    assert headers["x-content-type-options"] == "nosniff"


def test_a_request_id_of_the_client_is_kept(http: httpx.Client) -> None:
    assert http.get("/healthz", headers={"X-Request-ID": "trace-7"}).headers["x-request-id"] == "trace-7"


def test_a_request_id_that_could_forge_log_lines_is_not_kept(http: httpx.Client) -> None:
    assert http.get("/healthz", headers={"X-Request-ID": "a b"}).headers["x-request-id"] != "a b"


@pytest.mark.parametrize("route", ["/fine_tuning/jobs/submit", "/v1/fine_tuning/jobs/ftjob-1/cancel"])
def test_a_page_of_another_site_changes_nothing(http: httpx.Client, route: str) -> None:
    answer = http.post(route, headers={"Sec-Fetch-Site": "cross-site"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")
    assert answer.headers["x-request-id"]
    for site in ("same-origin", "same-site", "none"):
        assert http.post(route, headers={"Sec-Fetch-Site": site}).status_code != 403
    assert http.get("/healthz", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link to it


@pytest.mark.parametrize(
    ("host", "origin", "headers", "passes"),
    [
        ("10.0.0.7:8000", "http://evil.example", {}, False),
        ("10.0.0.7:8000", "http://10.0.0.7:8001", {}, False),
        ("10.0.0.7:8000", "http://10.0.0.7", {}, False),
        ("10.0.0.7", "http://10.0.0.7:443", {}, False),
        ("10.0.0.7:8000", "http://10.0.0.7:8000.evil.example", {}, False),
        ("10.0.0.7:8000", "null", {}, False),
        ("", "null", {}, False),
        ("10.0.0.7:8000", "http://10.0.0.7:8000", {}, True),
        ("Tuner.Example:80", "http://tuner.example", {}, True),
        ("tuner.example:443", "https://tuner.example", {}, True),
        ("[fd00::80]:8000", "http://[fd00::80]:8000", {}, True),
        ("[fd00::80]", "http://[fd00::80]", {}, True),
        ("[fd00::80]:8000", "http://[fd00::81]:8000", {}, False),
        # A proxy that connects under another name:
        ("replica:8000", "http://tuner.example", {}, False),
        ("replica:8000", "http://tuner.example", {"X-Forwarded-Host": "tuner.example"}, True),
        ("replica:8000", "http://tuner.example", {"X-Forwarded-Host": "tuner.example, inner"}, True),
        ("replica:8000", "http://evil.example", {"X-Forwarded-Host": "tuner.example"}, False),
        # Whatever the origin is, the browser has compared it:
        ("replica:8000", "https://tuner.example", {"Sec-Fetch-Site": "same-origin"}, True),
        ("tuner.example", "https://tuner.example", {"Sec-Fetch-Site": "cross-site"}, False),
    ],
)
def test_without_fetch_metadata_only_a_page_of_the_same_origin_changes_anything(
    http: httpx.Client, host: str, origin: str, headers: dict[str, str], passes: bool
) -> None:
    """As over plain HTTP. A page may send a form or nothing without a preflight request, so that is what is sent."""
    sent = {"Host": host, "Origin": origin, **headers}
    form = http.post("/v1/files", files={"file": ("rows.jsonl", b"{}")}, headers=sent)  # without its purpose
    for answer in (form, http.post("/v1/fine_tuning/jobs/ftjob-1/cancel", headers=sent)):
        assert (answer.status_code != 403) == passes
        assert (answer.json()["error"]["code"] != "cross_site") == passes
    assert http.get("/healthz", headers=sent).status_code == 200


@pytest.fixture(scope="module")
def known_as_tuner(serve: Serve) -> Server:
    return serve(hosts="tuner.example:Other.Example")


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("tuner.example", True),
        ("Tuner.Example.:8000", True),
        ("other.example:443", True),
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("127.0.0.1:8000", True),
        ("10.0.0.7", True),
        ("[::1]:8000", True),
        ("[fd00::80]", True),
        ("", True),
        ("evil.example:8000", False),
        ("tuner.example.evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("evil.example:tuner.example", False),
        ("me@localhost", False),
        ("[tuner.example]", False),
        ("[]", False),
    ],
)
def test_a_request_for_a_name_that_is_not_the_services_is_misdirected(
    known_as_tuner: Server, http: httpx.Client, host: str, passes: bool
) -> None:
    """As after DNS rebinding: to the browser, the request goes to the page's own origin."""
    sent = {"Host": host, "Origin": f"http://{host}", "X-Forwarded-Host": "localhost"}
    for method, path in (("GET", "/healthz"), ("POST", "/fine_tuning/jobs/cancel"), ("OPTIONS", "/v1/files")):
        answer = httpx.request(method, known_as_tuner.url + path, headers=sent)
        assert (answer.status_code == 421) != passes
        if not passes:
            error = answer.json()["error"]
            assert (error["code"], "TUNEWRIGHT_HOSTS" in error["message"]) == ("misdirected_request", True)
            assert answer.headers["x-request-id"]
    assert http.get("/healthz", headers=sent).status_code == 200  # TUNEWRIGHT_HOSTS is not set


def test_the_root_leads_to_the_reference(http: httpx.Client) -> None:
    answer = http.get("/", follow_redirects=True)
    assert answer.url.path == "/docs"
    assert answer.headers["content-type"].startswith("text/html")

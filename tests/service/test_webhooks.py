"""A webhook from a real service: a job that a runner finished, sent from the dispatcher's process."""

import signal
import time
from contextlib import suppress

import httpx

from tests.service.conftest import Api
from tests.waiting import WAIT_S, eventually
from tests.webhook_receiver import Receiver, verified


def test_a_finished_job_reaches_a_receiver_though_the_dispatcher_was_killed(api: Api) -> None:
    hook = {"name": "x", "event_types": ["fine_tuning.job.succeeded"]}
    with Receiver() as receiver:
        refused = api.http.post("/v1/webhook_endpoints", json=hook | {"url": "http://169.254.169.254/"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "webhook_url_refused")
        answer = api.http.post("/v1/webhook_endpoints", json=hook | {"url": receiver.url})
        assert answer.status_code == 200, answer.text
        endpoint = answer.json()
        job_id = api.submit(api.config())
        api.until_status(job_id, "running")
        for process in api.processes("DispatcherActor"):
            process.send_signal(signal.SIGKILL)
        api.until_status(job_id, "success")
        eventually(lambda: bool(receiver.got), WAIT_S, lambda: "nothing arrives")
        event = verified(receiver.got[0], endpoint["signing_secret"])
        assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", job_id)
        deliveries: list[dict[str, object]] = []

        def delivered() -> bool:
            with suppress(httpx.HTTPError):
                page = api.http.get(f"/v1/webhook_endpoints/{endpoint['id']}/deliveries")
                deliveries[:] = page.json()["data"] if page.is_success else []
            return [one["status"] for one in deliveries] == ["delivered"]

        eventually(delivered, WAIT_S, lambda: f"the deliveries stay {deliveries}")
    assert deliveries[0]["id"] == event.id
    assert time.time() - event.created_at < WAIT_S
    assert api.http.delete(f"/v1/webhook_endpoints/{endpoint['id']}").is_success

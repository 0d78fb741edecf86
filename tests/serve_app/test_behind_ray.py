"""What the API answers when the actors behind it, on Ray, are busy or don't answer."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import ray
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from events.actors import NAMESPACE
from serve_app.chat.deployment import RemoteAnswers
from tests.conftest import RayCluster
from tests.serve_app.live_server import Parts, Serve
from trainers.answers import Accepted, Part, Question
from trainers.dispatching.dispatcher_actor import NAME, DispatcherClient
from trainers.settings import Settings
from trainers.webhooks.client import WebhooksClient

QUESTION = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Are you there?"}]}


@pytest.fixture
def busy(ray_cluster: RayCluster) -> Iterator[DeploymentHandle[Any]]:
    """Works on one question without end; one more may wait."""

    class Busy:
        async def answer(self, _question: Question) -> AsyncGenerator[Part, None]:
            yield Accepted()
            await asyncio.Event().wait()

    one = ray_serve.deployment(max_ongoing_requests=1, max_queued_requests=1, ray_actor_options={"num_cpus": 0})(Busy)
    with ExitStack() as stack:
        stack.callback(ray_serve.shutdown)
        ray_serve.start(proxy_location="Disabled")
        yield ray_serve.run(one.bind(), name="busy", route_prefix=None)


def test_a_question_that_nobody_has_time_for_is_a_429_that_says_when_to_come_back(
    serve: Serve, busy: DeploymentHandle[Any]
) -> None:
    class BusyParts(Parts):
        def __init__(self, settings: Settings) -> None:
            super().__init__(settings)
            self.answers = RemoteAnswers(busy)

    server = serve(parts_type=BusyParts)

    async def ask_four() -> list[httpx.Response]:
        """The answers that were given: of four questions, one is worked on and one waits."""
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            asked = [asyncio.create_task(http.post("/v1/chat/completions", json=QUESTION)) for _ in range(4)]
            answered: set[asyncio.Task[httpx.Response]] = set()
            while len(answered) < 2:
                done, _ = await asyncio.wait(set(asked) - answered, return_when=asyncio.FIRST_COMPLETED)
                answered |= done
            for task in asked:
                task.cancel()
            await asyncio.wait(asked)
            return [task.result() for task in answered]

    for answer in asyncio.run(ask_four()):
        assert answer.status_code == 429, answer.text
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_questions")
        assert error["message"].endswith("try again")
        assert answer.headers["retry-after"]
        assert "x-should-retry" not in answer.headers


def test_a_dispatcher_that_does_not_answer_is_a_503(
    serve: Serve, ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck:
        async def webhooks(self, _method: str, *_arguments: object) -> None:
            await asyncio.Event().wait()

    make: Any = ray.remote(Stuck)  # Ray's types can't tell that it is a class
    stuck = make.options(num_cpus=0, name=NAME, namespace=NAMESPACE).remote()
    server = serve()
    dispatcher = DispatcherClient(server.parts.settings)
    monkeypatch.setattr("trainers.webhooks.client.CALL_S", 0.1)
    monkeypatch.setattr(server.parts, "webhooks", WebhooksClient(dispatcher))
    answer = httpx.get(f"{server.url}/v1/webhook_endpoints", timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "webhooks_unavailable")
    assert answer.headers["retry-after"]
    ray.kill(stuck)

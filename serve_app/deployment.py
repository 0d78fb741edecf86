"""The Ray Serve application: `serve run serve_app:app`, or `serve deploy serve_app/serve.yaml`."""

import asyncio
import logging
import os
import time
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from events.actors import collect_rarely, log_with_times
from serve_app.api import build_api
from serve_app.chat import deployment as chat
from serve_app.replica import before_draining, hold_up_fast_senders, listen_on_node_address_only
from trainers import service
from trainers.settings import Settings, misspelled, settings

MAX_ONGOING_REQUESTS = 2000
"""Requests that one replica handles at a time. Each open tail is one, and mostly waits; a thousand of them must leave
room for all other requests."""


class Api:
    """A replica: connects to the service's actors, which it starts if they don't run, and serves the API."""

    # Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, settings: Settings, deployed_at: float, answers: DeploymentHandle[Any]
    ) -> None:
        log_with_times()
        listen_on_node_address_only()
        hold_up_fast_senders()
        loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        before_draining(lambda: loop.call_soon_threadsafe(self._closing.set))
        self._answers = chat.RemoteAnswers(answers)
        # Connecting blocks, and this runs on the replica's event loop.
        self._service = await asyncio.to_thread(service.start, settings, deployed_at)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the replica is connected."""
        # Serve puts x-request-id on every response.
        api = build_api(self._service, self._answers, sends_request_id=False, closing=self._closing)
        collect_rarely()
        return api


deployment = serve.deployment(
    name="api",
    num_replicas=1,
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    graceful_shutdown_timeout_s=5,  # Longer than an answer takes; open tails end by themselves, see before_draining.
    # No CPU, because CPUs are for training. On the head node, with the event log and the proxy: the API may then listen
    # on loopback only.
    ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    logging_config={"enable_access_log": False},  # A line for each request costs more than most answers.
)(serve.ingress()(Api))

for line in misspelled(os.environ):
    logging.getLogger("tunewright").warning(line)
# The settings are read where the application is built: with `serve run` in its shell, otherwise on the head node.
app = deployment.bind(settings(), time.time(), chat.application(settings()))

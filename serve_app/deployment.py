"""The door on Ray Serve: `serve run serve_app:app`, or `serve deploy serve_app/serve.yaml`."""

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
"""Requests one replica works on at a time. Each open tail is one, and waits more than it works; a thousand of them
must leave room for everybody else."""


class Api:
    """One replica: connects to the service's actors, starting what isn't there, and serves the API in front of them."""

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
    # No CPU, because those are for training. Next to the event log and the proxy, so the door can stay on loopback.
    ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    logging_config={"enable_access_log": False},  # A line for each request costs more than most of the answers.
)(serve.ingress()(Api))

for line in misspelled(os.environ):
    logging.getLogger("tunewright").warning(line)
# Read where the application is built: with `serve run` that is the shell it was typed in, else the head node.
app = deployment.bind(settings(), time.time(), chat.application(settings()))

"""The door on Ray Serve: `serve run serve_app:app`, or `serve deploy serve_app/serve.yaml`."""

import asyncio

from fastapi import FastAPI
from ray import serve

from serve_app.api import build_api
from trainers import service
from trainers.settings import settings

MAX_ONGOING_REQUESTS = 1000
"""Requests one replica works on at a time. Each open tail is one, and waits more than it works; a few hundred of them
must leave room for everybody else."""


class Api:
    """One replica: connects to the service's actors, starting what isn't there, and serves the API in front of them."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        # Connecting blocks, and this runs on the replica's event loop.
        self._service = await asyncio.to_thread(service.start, settings())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the replica is connected."""
        return build_api(self._service, sends_request_id=False)  # Serve puts x-request-id on every response.


deployment = serve.deployment(
    name="api",
    num_replicas=1,
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    graceful_shutdown_timeout_s=5,  # Open tails would hold a redeploy up for longer; they resume by offset.
    # No CPU, because those are for training. Next to the event log and the proxy, so the door can stay on loopback.
    ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
)(serve.ingress()(Api))

app = deployment.bind()

"""The door on Ray Serve: `serve run serve_app:app`, or `serve deploy serve_app/serve.yaml`."""

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray._common.network_utils import build_address
from ray.serve._private import replica
from ray.util import get_node_ip_address

from serve_app.api import build_api
from trainers import service
from trainers.settings import settings

MAX_ONGOING_REQUESTS = 1000
"""Requests one replica works on at a time. Each open tail is one, and waits more than it works; a few hundred of them
must leave room for everybody else."""


class Api:
    """One replica: connects to the service's actors, starting what isn't there, and serves the API in front of them."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        listen_on_node_address_only()
        # Connecting blocks, and this runs on the replica's event loop.
        self._service = await asyncio.to_thread(service.start, settings())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the replica is connected."""
        return build_api(self._service, sends_request_id=False)  # Serve puts x-request-id on every response.


def listen_on_node_address_only() -> None:
    """Serve opens a port in every replica, after its constructor, that unpickles what it is sent: on all interfaces, and
    without a setting for it. Its callers use the address of the node (loopback, for a local service); that suffices."""
    listen = replica.add_port_to_grpc_server

    def listen_there(server: Any, address: str) -> int:  # noqa: ANN401  -- a gRPC server; grpc has no types
        port: int = listen(server, build_address(get_node_ip_address(), address.rpartition(":")[2]))
        return port

    replica.add_port_to_grpc_server = listen_there


deployment = serve.deployment(
    name="api",
    num_replicas=1,
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    graceful_shutdown_timeout_s=5,  # Open tails would hold a redeploy up for longer; they resume by offset.
    # No CPU, because those are for training. Next to the event log and the proxy, so the door can stay on loopback.
    ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
)(serve.ingress()(Api))

app = deployment.bind()

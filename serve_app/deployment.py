"""The door on Ray Serve: `serve run serve_app:app`, or `serve deploy serve_app/serve.yaml`."""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve._private import replica

from serve_app.api import build_api
from trainers import service
from trainers.settings import Settings, settings

MAX_ONGOING_REQUESTS = 2000
"""Requests one replica works on at a time. Each open tail is one, and waits more than it works; a thousand of them
must leave room for everybody else."""


class Api:
    """One replica: connects to the service's actors, starting what isn't there, and serves the API in front of them."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        listen_on_node_address_only()
        loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        before_draining(lambda: loop.call_soon_threadsafe(self._closing.set))
        # Connecting blocks, and this runs on the replica's event loop.
        self._service = await asyncio.to_thread(service.start, settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the replica is connected."""
        # Serve puts x-request-id on every response.
        return build_api(self._service, sends_request_id=False, closing=self._closing)


def listen_on_node_address_only() -> None:
    """To be called in a replica's constructor, after which Serve opens a port that unpickles what it is sent: on every
    interface, and without a setting for it. Its callers use the address of the node, so that address suffices."""
    ray_s: Any = replica  # private, and typed for nobody else
    listen = ray_s.add_port_to_grpc_server
    node_address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]

    def listen_there(server: object, address: str) -> int:
        port: int = listen(server, f"{node_address}:{address.rpartition(':')[2]}")
        return port

    ray_s.add_port_to_grpc_server = listen_there


def before_draining(call: Callable[[], object]) -> None:
    """To be called in a replica's constructor: `call` is called, on whatever thread, when Serve begins to shut the
    replica down, while its open streams can still be written to. Serve tells the application only when they have ended.
    """
    ray_s: Any = replica.Replica
    drain = ray_s._perform_graceful_shutdown

    async def call_and_drain(self: object) -> None:
        call()
        await drain(self)

    ray_s._perform_graceful_shutdown = call_and_drain


deployment = serve.deployment(
    name="api",
    num_replicas=1,
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    graceful_shutdown_timeout_s=5,  # Longer than an answer takes; open tails end by themselves, see before_draining.
    # No CPU, because those are for training. Next to the event log and the proxy, so the door can stay on loopback.
    ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    logging_config={"enable_access_log": False},  # A line for each request costs more than most of the answers.
)(serve.ingress()(Api))

# Read where the application is built: with `serve run` that is the shell it was typed in, else the head node.
app = deployment.bind(settings())

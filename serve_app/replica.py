"""What every replica of ours does in its constructor."""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.serve._private import direct_ingress_http_util, replica

WAITING_MESSAGES = 4
"""Pieces of a body, each as much as uvicorn holds (some hundred KiB), that wait for the application. A request without
a body, or with a small one, leaves room among them for the news that its client has gone."""


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


def hold_up_fast_senders() -> None:
    """To be called in a replica's constructor: a client that sends its body faster than the application reads it waits.

    To see a client go, Serve reads each request on ahead, and queues what it reads without a limit: an upload that the
    storage can't keep up with would lie in memory. While a body waits to be read, nobody sees its client go; with a
    server that reads no further than it is asked to, that is so too.
    """
    ray_s: Any = direct_ingress_http_util.ASGIDIReceiveProxy
    begin = ray_s.__init__

    def begin_bounded(self: Any, scope: object, receive: object, loop: asyncio.AbstractEventLoop) -> None:  # noqa: ANN401
        begin(self, scope, receive, loop)
        if loop is asyncio.get_running_loop():  # from another one Serve can't wait for room, and would lose messages
            self._queue = asyncio.Queue(WAITING_MESSAGES)

    ray_s.__init__ = begin_bounded

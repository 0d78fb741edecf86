"""Changes to Ray Serve that every replica makes in its constructor."""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.serve._private import direct_ingress_http_util, replica

WAITING_MESSAGES = 4
"""How many pieces of a body, each as large as uvicorn's buffer (some hundred KiB), may wait for the application. A
request with no body or a small one leaves room in this queue for the message that its client has gone."""


def listen_on_node_address_only() -> None:
    """Makes Serve's gRPC port listen on the node's address only. Call it in a replica's constructor.

    Serve opens that port after the constructor, on every interface and without a setting for it, and unpickles what is
    sent to it. Its callers use the node's address.
    """
    ray_s: Any = replica  # private, and without types for us
    listen = ray_s.add_port_to_grpc_server
    node_address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]

    def listen_there(server: object, address: str) -> int:
        port: int = listen(server, f"{node_address}:{address.rpartition(':')[2]}")
        return port

    ray_s.add_port_to_grpc_server = listen_there


def before_draining(call: Callable[[], object]) -> None:
    """Has `call` called, on any thread, when Serve begins to shut the replica down and open streams can still be
    written to: Serve tells the application only when they have ended. Call it in a replica's constructor."""
    ray_s: Any = replica.Replica
    drain = ray_s._perform_graceful_shutdown

    async def call_and_drain(self: object) -> None:
        call()
        await drain(self)

    ray_s._perform_graceful_shutdown = call_and_drain


def hold_up_fast_senders() -> None:
    """Makes a client wait that sends its body faster than the application reads it. Call it in a replica's constructor.

    To notice that a client disconnects, Serve reads each request ahead and queues what it reads without a limit: an
    upload that the storage can't keep up with would fill the memory. With the limit, a disconnect isn't noticed while a
    body waits to be read; the same is true of servers that don't read ahead.
    """
    ray_s: Any = direct_ingress_http_util.ASGIDIReceiveProxy
    begin = ray_s.__init__

    def begin_bounded(self: Any, scope: object, receive: object, loop: asyncio.AbstractEventLoop) -> None:  # noqa: ANN401
        begin(self, scope, receive, loop)
        if loop is asyncio.get_running_loop():  # on another loop Serve can't wait for room, and would lose messages
            self._queue = asyncio.Queue(WAITING_MESSAGES)

    ray_s.__init__ = begin_bounded

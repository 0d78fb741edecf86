"""What every replica of ours does in its constructor."""

from collections.abc import Callable
from typing import Any

import ray
from ray.serve._private import replica


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

"""Where webhooks may be sent: to hosts on the public internet, or in a network that the operator allows.

A name is resolved and its addresses are checked when an endpoint is created, so that its creator learns why it is
refused, and again for each delivery, which then connects to an address that was checked and to no other.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpx

Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Resolves a host and port to addresses, in the order to try them. Raises OSError, or ValueError for an invalid
host."""

NOT_PUBLIC = (
    "its host resolves to an address that is not public (private, loopback, link-local, reserved), and is not in "
    "TUNEWRIGHT_WEBHOOK_NETWORKS"
)
_THREADS = 64


class TargetRefused(Exception):
    """Nothing is sent to this URL. The message says why, without repeating any of it."""


def parse(text: str) -> httpx.URL:
    """An http(s) URL without credentials. Raises TargetRefused."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise TargetRefused("is not a URL") from None
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise TargetRefused("must be an http or https URL with a host")
    if url.userinfo:
        raise TargetRefused("must not contain credentials: verify the signature instead")
    if not 0 < port_of(url) < 1 << 16:
        raise TargetRefused("has an invalid port")
    return url


def port_of(url: httpx.URL) -> int:
    if url.port is not None:
        return url.port
    return 443 if url.scheme == "https" else 80


async def addresses_of(url: httpx.URL, allowed: Sequence[Network], resolve: Resolve) -> list[str]:
    """The addresses that the URL's host resolves to now, at least one. Raises TargetRefused if it can't be resolved, or
    if any of them is not allowed."""
    try:
        addresses = await resolve(url.raw_host.decode("ascii"), port_of(url))
    except (OSError, ValueError):
        addresses = []
    if not addresses:
        raise TargetRefused("its host can't be resolved: check the name")
    if not all(_is_allowed(ip_address(address), allowed) for address in addresses):
        raise TargetRefused(NOT_PUBLIC)
    return addresses


def _is_allowed(address: IPv4Address | IPv6Address, allowed: Sequence[Network]) -> bool:
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped  # the system connects to the IPv4 address
    if any(address in network for network in allowed):
        return True
    if isinstance(address, IPv6Address) and (address.sixtofour is not None or address.is_site_local):
        return False  # 6to4 leads to an IPv4 address; so does 64:ff9b::/96, which is_reserved covers
    return address.is_global and not address.is_multicast and not address.is_reserved


class Resolver:
    """The system's own resolver, IPv4 first. It blocks, so it has threads of its own; a name server that doesn't answer
    costs one thread for each host that is asked for, however many wait for the answer."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="webhook-resolver")
        self._asked: dict[tuple[str, int], asyncio.Future[list[str]]] = {}

    async def __call__(self, host: str, port: int) -> list[str]:
        key = host, port
        if key not in self._asked:
            asked = asyncio.get_running_loop().run_in_executor(self._threads, _look_up, host, port)
            self._asked[key] = asked
            asked.add_done_callback(lambda done: (self._asked.pop(key), done.cancelled() or done.exception()))
        return await asyncio.shield(self._asked[key])

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    return list(dict.fromkeys(str(one[4][0]) for one in found))

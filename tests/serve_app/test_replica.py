"""A request from uvicorn through Serve's own layers to the application, as a replica sets them up."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy
from starlette.types import Receive, Scope, Send

from serve_app.replica import hold_up_fast_senders
from tests.waiting import WAIT_S, async_eventually

BODY_BYTES = 64 << 20
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
OK = b"HTTP/1.1 200"


@pytest.fixture(autouse=True)
def _held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ASGIDIReceiveProxy, "__init__", ASGIDIReceiveProxy.__init__)  # restored at the end
    hold_up_fast_senders()


@asynccontextmanager
async def replica(handle: Callable[[Receive, asyncio.Task[None]], Awaitable[None]]) -> AsyncIterator[socket.socket]:
    """A connection to a server that calls `handle` as Serve does: with a proxy of `receive`, and the task that fills it
    and ends when the client has gone."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        proxy = ASGIDIReceiveProxy(scope, receive, asyncio.get_running_loop())
        fetching = proxy.fetch_until_disconnect_task()
        await handle(proxy, fetching)
        fetching.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        with socket.create_connection(listener.getsockname()) as connection:
            connection.setblocking(False)
            yield connection
    finally:
        server.should_exit = True
        await serving


async def read_all(receive: Receive) -> int:
    """The bytes of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        size, more = size + len(message["body"]), message["more_body"]
    return size


async def send_all(connection: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, data)


async def answer(connection: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 1000), WAIT_S)


def test_a_client_that_sends_faster_than_its_body_is_read_waits_and_nothing_is_lost() -> None:
    async def upload() -> None:
        reads, size = asyncio.Event(), 0

        async def handle(receive: Receive, _: asyncio.Task[None]) -> None:
            nonlocal size
            await reads.wait()
            size = await read_all(receive)

        async with replica(handle) as connection:
            sending = asyncio.create_task(send_all(connection, HEAD % BODY_BYTES + bytes(BODY_BYTES)))
            done, _ = await asyncio.wait({sending}, timeout=2)  # on loopback, 64 MiB take a tenth of that
            assert not done
            reads.set()
            await sending
            assert (await answer(connection)).startswith(OK)
        assert size == BODY_BYTES

    asyncio.run(upload())


def test_a_body_that_nobody_reads_does_not_keep_its_client_from_an_answer() -> None:
    async def upload() -> None:
        async def handle(_: Receive, __: asyncio.Task[None]) -> None:
            pass

        async with replica(handle) as connection:
            sending = asyncio.create_task(send_all(connection, HEAD % BODY_BYTES + bytes(BODY_BYTES)))
            assert (await answer(connection)).startswith(OK)
            await sending

    asyncio.run(upload())


@pytest.mark.parametrize(("size", "reads"), [(0, False), (1000, False), (BODY_BYTES, True)])
def test_a_client_that_goes_is_noticed_if_its_body_is_small_or_was_read(size: int, reads: bool) -> None:
    async def go() -> None:
        waits, gone = asyncio.Event(), asyncio.Event()

        async def handle(receive: Receive, fetching: asyncio.Task[None]) -> None:
            if reads:
                await read_all(receive)
            waits.set()
            await fetching
            gone.set()

        async with replica(handle) as connection:
            await send_all(connection, HEAD % size + bytes(size))
            await waits.wait()
            connection.close()
            assert await asyncio.wait_for(gone.wait(), WAIT_S)

    asyncio.run(go())


def test_a_client_that_goes_in_the_middle_of_its_body_is_noticed_by_whoever_reads_it() -> None:
    async def go() -> None:
        seen: list[str] = []

        async def handle(receive: Receive, fetching: asyncio.Task[None]) -> None:
            while seen[-1:] != ["http.disconnect"]:
                seen.append((await receive())["type"])
            await fetching

        async with replica(handle) as connection:
            await send_all(connection, HEAD % BODY_BYTES + bytes(BODY_BYTES // 2))
            connection.close()
            await async_eventually(lambda: seen[-1:] == ["http.disconnect"], WAIT_S, lambda: f"received {set(seen)}")
        assert set(seen[:-1]) == {"http.request"}

    asyncio.run(go())

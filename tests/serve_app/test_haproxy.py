"""HAProxy, started and reloaded by Ray's own code: its statistics and metrics stay on loopback, and while the service
isn't there it says so."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import psutil
import pytest
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions

import serve_app
from serve_app.wire import ErrorEnvelope
from tests.ports import free_ports

WRAPPER = Path(serve_app.__file__).parent / "haproxy-on-loopback"


class Proxy:
    """HAProxy as Ray configures it, with the wrapper in its place."""

    def __init__(self, directory: Path) -> None:
        self.port, self.stats, self.metrics = free_ports(3)
        config = haproxy.HAProxyConfig(
            http_options=HTTPOptions(host="0.0.0.0", port=self.port),  # noqa: S104  -- asked for, so kept
            stats_port=self.stats,
            metrics_port=self.metrics,
            socket_path=str(directory / "s"),
            server_state_base=str(directory),
            server_state_file=str(directory / "state"),
        )
        self.api = haproxy.HAProxyApi(config, config_file_path=str(directory / "c"))

    def run(self, *steps: Callable[[], Awaitable[None]]) -> None:
        """Starts it, takes the steps and ends it."""

        async def run() -> None:
            try:
                await self.api.start()  # returns once the new process answers
                for step in steps:
                    await step()
            finally:
                await self.api.stop()

        asyncio.run(run())

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False) as http:
            return await http.get(path)


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    monkeypatch.setattr(haproxy, "RAY_SERVE_HAPROXY_BINARY_PATH", str(WRAPPER))
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(WRAPPER))  # it must not take itself for HAProxy
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
    return Proxy(tmp_path)


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    return {(c.laddr.ip, c.laddr.port) for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def assert_unavailable(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    error = ErrorEnvelope.model_validate_json(answer.content).error
    assert (error.type, error.code) == ("service_unavailable_error", "service_unavailable")


def test_only_the_api_listens_where_it_was_put_also_after_a_reload(proxy: Proxy) -> None:
    seen = []

    async def look() -> None:
        assert proxy.api.count_haproxy_processes() >= 1  # Ray recognises it by its command line
        assert proxy.api._proc is not None
        seen.append(listening(psutil.Process(proxy.api._proc.pid)))

    proxy.run(look, proxy.api.reload, look)
    expected = {("0.0.0.0", proxy.port), ("127.0.0.1", proxy.stats), ("127.0.0.1", proxy.metrics)}  # noqa: S104
    assert seen == [expected, expected]


def test_before_the_service_is_there_everything_is_a_503_with_the_time_to_try_again(proxy: Proxy) -> None:
    async def ask() -> None:
        for path in ("/fine_tuning/jobs/tail?job_id=ftjob-1", "/v1/models", "/"):
            assert_unavailable(await proxy.get(path))
        for path in ("/-/healthz", "/-/routes"):  # Ray's own, which have their own answers
            assert "try again" not in (await proxy.get(path)).text

    proxy.run(ask, proxy.api.reload, ask)


@pytest.mark.parametrize("status", [404, 500])
@pytest.mark.parametrize(
    ("sent", "own"),
    [("text/plain\r\ncontent-length: 4\r\n\r\ngone", False), ("application/json\r\ncontent-length: 2\r\n\r\n{}", True)],
)
def test_a_404_or_500_of_rays_is_a_503_and_one_of_the_services_stays_one(
    proxy: Proxy, status: int, sent: str, *, own: bool
) -> None:
    """What stands in for a replica that is gone knows no path, and what asks one that dies knows no reason. Both say so
    in plain text."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        health = b"/-/healthz" in await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {200 if health else status} X\r\nconnection: close\r\ncontent-type: {sent}".encode())
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1")
        port = server.sockets[0].getsockname()[1]
        replica = haproxy.ServerConfig(name="replica", host="127.0.0.1", port=port)
        backend = haproxy.BackendConfig(name="api", path_prefix="/", app_name="api", fallback_server=replica)
        proxy.api.set_backend_configs({"api": backend})
        await proxy.api.reload()
        found = await proxy.get("/fine_tuning/jobs/status?job_id=ftjob-1")
        if own:
            assert (found.status_code, found.text) == (status, "{}")
        else:
            assert_unavailable(found)
        server.close()
        await server.wait_closed()
        assert_unavailable(await proxy.get("/fine_tuning/jobs/status?job_id=ftjob-1"))

    proxy.run(serve)


def test_a_replica_that_dies_with_a_request_is_a_503_and_no_bug(proxy: Proxy) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/-/healthz" in await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 X\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def serve() -> None:
        async with await asyncio.start_server(die, "127.0.0.1") as server:
            port = server.sockets[0].getsockname()[1]
            replica = haproxy.ServerConfig(name="replica", host="127.0.0.1", port=port)
            backend = haproxy.BackendConfig(name="api", path_prefix="/", app_name="api", fallback_server=replica)
            proxy.api.set_backend_configs({"api": backend})
            await proxy.api.reload()
            assert_unavailable(await proxy.get("/v1/models"))

    proxy.run(serve)

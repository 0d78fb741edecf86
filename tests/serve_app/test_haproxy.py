"""HAProxy, started and reloaded by Ray's own code: its statistics and metrics stay on loopback."""

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions

import serve_app
from tests.ports import free_ports

WRAPPER = Path(serve_app.__file__).parent / "haproxy-on-loopback"


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    return {(c.laddr.ip, c.laddr.port) for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def test_only_the_api_listens_where_it_was_put_also_after_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haproxy, "RAY_SERVE_HAPROXY_BINARY_PATH", str(WRAPPER))
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(WRAPPER))  # it must not take itself for HAProxy
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
    port, stats, metrics = free_ports(3)
    config = haproxy.HAProxyConfig(
        http_options=HTTPOptions(host="0.0.0.0", port=port),  # noqa: S104  -- asked for, so kept
        stats_port=stats,
        metrics_port=metrics,
        socket_path=str(tmp_path / "s"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "state"),
    )
    proxy = haproxy.HAProxyApi(config, config_file_path=str(tmp_path / "c"))

    async def start_and_reload() -> list[set[tuple[str, int]]]:
        try:
            seen = []
            for step in (proxy.start, proxy.reload):
                await step()  # returns once the new process answers
                assert proxy.count_haproxy_processes() >= 1  # Ray recognises it by its command line
                seen.append(listening(psutil.Process(proxy._proc.pid)))
            return seen
        finally:
            await proxy.stop()

    expected = {("0.0.0.0", port), ("127.0.0.1", stats), ("127.0.0.1", metrics)}  # noqa: S104
    assert asyncio.run(start_and_reload()) == [expected, expected]

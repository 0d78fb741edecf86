"""A running API, and clients of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve_app.live_server import Parts, Serve, Server
from trainers.settings import Settings


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts servers; the arguments are settings, or `parts_type`."""
    servers: list[Server] = []

    def start(parts_type: type[Parts] = Parts, **changes: Any) -> Server:
        storage = tmp_path_factory.mktemp("storage")
        settings = Settings(storage=storage, data_roots=(storage,), model_roots=(storage,), **changes)
        (storage / "rows.jsonl").write_text(json.dumps({"dialog": [{"role": "assistant", "content": "hi"}]}) + "\n")
        servers.append(Server(parts_type(settings)))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(serve: Serve) -> Server:
    """One server for every test that needs no settings of its own."""
    return serve(heartbeat_s=0.5)


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def storage(server: Server) -> Path:
    """A directory that data and models may lie in."""
    return server.parts.settings.storage


@pytest.fixture
def config(server: Server) -> dict[str, Any]:
    """The smallest good request."""
    return server.config()


@pytest.fixture
def submit(server: Server) -> Callable[..., str]:
    """Submits a job and returns its id."""
    return server.submit

"""The real client, pointed at a running API."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.serve_app.live_server import MODEL, Serve, Server
from trainers.files import file_store

ROW = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}) + "\n"
ROWS = (ROW * 3).encode()


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    """One server for a module: the tests of one module see their own jobs and files only."""
    return serve(max_file_bytes=1 << 20, max_upload_bytes=4 << 20)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connected(server) as client:
        yield client


def connected(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=30)


def stored(server: Server) -> set[str]:
    return set(file_store(server.parts.settings.files_url).objects.sizes())


@pytest.fixture
def create(client: openai.OpenAI) -> Callable[..., Any]:
    """Uploads a file and creates a job with it."""

    def create(**changes: Any) -> Any:
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        return client.fine_tuning.jobs.create(**{"model": MODEL, "training_file": file.id, **changes})

    return create

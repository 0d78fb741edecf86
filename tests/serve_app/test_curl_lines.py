"""The curl lines of GET /docs work when they are pasted into a shell."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.serve_app.live_server import Parts, Server
from tests.tiny_models import make_tiny_model
from trainers.models import smollm2
from trainers.settings import Settings
from trainers.webhooks.deliverer import Webhooks

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples" / "tickets" / "train.jsonl"
DOWNLOADS = ("GET /v1/files/{file_id}/content", "GET /v1/fine_tuning/checkpoints/{checkpoint_id}/content")
UNKNOWN = re.compile(r"unknown_(job|upload)|(file|model|checkpoint|webhook_endpoint|webhook_delivery)_not_found")


class Connected(Parts):
    """Makes example.com, the host in an example, resolve to an address."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.webhooks = Webhooks(self.log, settings, resolve=self._resolve)

    async def _resolve(self, _host: str, _port: int) -> list[str]:
        return ["8.8.8.8"]


class Answered(NamedTuple):
    status: int
    body: str

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = Settings(storage=tmp_path_factory.mktemp("storage"), data_roots=(ROOT,))
    # The model of the examples, as if it had been fetched; the real one takes long to load on a busy machine.
    make_tiny_model(settings.model_cache / smollm2.conversion_name())
    server = Server(Connected(settings))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def lines(server: Server) -> dict[str, str]:
    """The curl line of each operation, by `METHOD path`."""
    page = httpx.get(f"{server.url}/docs").text
    pairs = re.findall(r'<section id="([A-Z]+)(/[^"]*)">.*?<pre>(curl .*?)</pre>', page, re.DOTALL)
    return {f"{method} {path}": html.unescape(line) for method, path, line in pairs}


def pasted(line: str) -> Answered:
    """Run in a shell, in the directory that the service was started in."""
    body, _, status = run(line, ROOT).rpartition("\n")
    return Answered(int(status), body)


def run(line: str, directory: Path) -> str:
    """The output of a curl line, with the status as its last line."""
    command = ["/bin/sh", "-c", f"{line} -s -w '\\n%{{http_code}}'"]
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, timeout=200, check=False).stdout


def test_every_operation_has_a_line_that_is_its_own(server: Server, lines: dict[str, str]) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    operations = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert lines.keys() == operations
    assert len(set(lines.values())) == len(lines)


def test_a_line_asks_for_what_it_stands_for_or_for_something_that_is_not_there(lines: dict[str, str]) -> None:
    for operation, line in lines.items():
        if operation in DOWNLOADS:
            continue
        answered = pasted(line)
        named = re.search(r"[A-Z_]{5,}(?=[/'\s]|$)|01\.\.\.", line.partition("://")[2])
        if named:
            assert (answered.status, bool(UNKNOWN.fullmatch(answered.code))) == (404, True), (operation, answered)
        else:
            assert answered.status == 200, (operation, answered)


def test_a_line_with_a_name_put_in_finds_it(lines: dict[str, str]) -> None:
    job_id = json.loads(pasted(lines["POST /fine_tuning/jobs/submit"]).body)["job_id"]
    hook_id = json.loads(pasted(lines["POST /v1/webhook_endpoints"]).body)["id"]
    file_id = json.loads(pasted(lines["POST /v1/files"]).body)["id"]
    names = {"JOB_ID": job_id, "ftjob-01...": job_id, "WEBHOOK_ENDPOINT_ID": hook_id, "FILE_ID": file_id}
    for operation in (
        "GET /fine_tuning/jobs/status",
        "POST /fine_tuning/jobs/pause",
        "POST /v1/fine_tuning/jobs/{job_id}/resume",
        "GET /v1/fine_tuning/jobs/{job_id}/events",
        "POST /v1/webhook_endpoints/{webhook_endpoint_id}",
        "POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
        "DELETE /v1/webhook_endpoints/{webhook_endpoint_id}",
        "DELETE /v1/files/{file_id}",
    ):
        line = lines[operation]
        for placeholder, name in names.items():
            line = line.replace(placeholder, name)
        answered = pasted(line)
        assert answered.status == 200, (operation, answered)


def test_the_line_of_a_download_makes_a_file_of_its_own_name_or_none(lines: dict[str, str], tmp_path: Path) -> None:
    for operation in DOWNLOADS:
        assert run(lines[operation], tmp_path) == "\n404"
    assert not list(tmp_path.iterdir())
    file_id = json.loads(pasted(lines["POST /v1/files"]).body)["id"]
    run(lines["GET /v1/files/{file_id}/content"].replace("FILE_ID", file_id), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {TRAIN.name: TRAIN.read_bytes()}


def test_the_lines_of_an_upload_make_a_file(lines: dict[str, str]) -> None:
    upload_id = json.loads(pasted(lines["POST /v1/uploads"]).body)["id"]
    part = pasted(lines["POST /v1/uploads/{upload_id}/parts"].replace("UPLOAD_ID", upload_id))
    complete = lines["POST /v1/uploads/{upload_id}/complete"].replace("UPLOAD_ID", upload_id)
    completed = pasted(complete.replace("part_01...", json.loads(part.body)["id"]))
    assert json.loads(completed.body)["file"]["bytes"] == TRAIN.stat().st_size

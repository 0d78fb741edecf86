"""Uploads in parts, through the real client."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ulid import ULID

from serve_app.api import build_api
from tests.serve_app.live_server import Serve, Server
from tests.serve_app.openai.conftest import ROWS, connected, stored
from tests.waiting import WAIT_S, eventually
from trainers.errors import InfrastructureError
from trainers.files import UPLOAD_LIFETIME_S, FileStore, file_store


def test_an_upload_in_parts_is_a_file(client: openai.OpenAI, server: Server, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_bytes(ROWS * 1000)
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=50_000, md5=md5
    )
    assert (upload.status, upload.bytes) == ("completed", path.stat().st_size)
    assert upload.file is not None
    assert client.files.content(upload.file.id).read() == path.read_bytes()
    assert not [name for name in stored(server) if name.startswith(f"{upload.id}.part_")]


def begin(client: openai.OpenAI, size: int = 4) -> Any:
    return client.uploads.create(bytes=size, filename="f.jsonl", mime_type="application/jsonl", purpose="fine-tune")


def test_parts_stand_in_the_order_that_completing_names(client: openai.OpenAI) -> None:
    upload = begin(client, 7)
    parts = [client.uploads.parts.create(upload.id, data=data).id for data in (b":1}", b'{"a"')]
    done = client.uploads.complete(upload.id, part_ids=parts[::-1])
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b'{"a":1}'
    assert client.uploads.complete(upload.id, part_ids=parts[::-1]) == done  # a retry


def test_a_wrong_md5_size_or_part_is_a_400_and_the_upload_can_still_be_completed(client: openai.OpenAI) -> None:
    upload = begin(client, 7)
    part = client.uploads.parts.create(upload.id, data=b'{"a":1}')
    for wrong, code in (
        ({"part_ids": [part.id], "md5": "0" * 32}, "wrong_md5"),
        ({"part_ids": [part.id, part.id]}, "wrong_size"),
        ({"part_ids": ["part_none"]}, "unknown_part"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.uploads.complete(upload.id, **wrong)
        assert refused.value.code == code
    assert client.uploads.complete(upload.id, part_ids=[part.id]).status == "completed"


def test_the_record_of_an_upload_can_not_be_named_as_a_part(client: openai.OpenAI, server: Server) -> None:
    upload = begin(client)
    size = file_store(server.parts.settings.files_url).objects.sizes()[f"{upload.id}.json"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.uploads.complete(begin(client, size).id, part_ids=["json"])
    assert refused.value.code == "unknown_part"
    assert isinstance(refused.value.body, dict)
    assert [problem["code"] for problem in refused.value.body["errors"]] == ["unknown_part"]


def test_an_upload_that_is_being_completed_can_not_be_cancelled(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = begin(client, len(ROWS))
    part = client.uploads.parts.create(upload.id, data=ROWS)
    objects = file_store(server.parts.settings.files_url).objects
    read, reading, goes_on = objects.read, threading.Event(), threading.Event()

    def slowly(name: str, start: int = 0) -> Iterator[bytes]:
        reading.set()
        goes_on.wait()
        yield from read(name, start)

    monkeypatch.setattr(objects, "read", slowly)
    with ThreadPoolExecutor(2) as pool:
        try:
            completing = pool.submit(client.uploads.complete, upload.id, part_ids=[part.id])
            assert reading.wait(60)
            cancelling = pool.submit(client.uploads.cancel, upload.id)
            wait([cancelling], timeout=2)  # it has no answer yet, however long that takes
        finally:
            goes_on.set()
        completed = completing.result()
        assert completed.status == "completed"
        with pytest.raises(openai.ConflictError):
            cancelling.result()
    assert completed.file is not None
    assert client.files.content(completed.file.id).read() == ROWS


def new_content(server: Server, before: set[str]) -> list[str]:
    """The objects with bytes of files that were stored since."""
    return [name for name in stored(server) - before if name.startswith("bytes-")]


def test_completing_goes_on_when_its_client_has_gone_and_a_retry_gets_its_file(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = begin(client, len(ROWS))
    part = client.uploads.parts.create(upload.id, data=ROWS)
    before = stored(server)
    objects = file_store(server.parts.settings.files_url).objects
    read, reading, goes_on, joins = objects.read, threading.Event(), threading.Event(), 0

    def slowly(name: str, start: int = 0) -> Iterator[bytes]:
        nonlocal joins
        joins += 1
        reading.set()
        goes_on.wait()
        yield from read(name, start)

    async def ask_and_go() -> None:
        """As Serve does it: the request's task is cancelled when its client has gone."""
        api = build_api(server.parts, server.parts.answers)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as http:
            asking = asyncio.create_task(http.post(f"/v1/uploads/{upload.id}/complete", json={"part_ids": [part.id]}))
            await asyncio.to_thread(reading.wait, WAIT_S)
            asking.cancel()
            await asyncio.wait([asking])

    monkeypatch.setattr(objects, "read", slowly)
    with ThreadPoolExecutor(1) as pool:
        try:
            server.do(ask_and_go())
            retry = pool.submit(client.uploads.complete, upload.id, part_ids=[part.id])
            wait([retry], timeout=1)  # it has no answer yet, however long that takes
            assert joins == 1
        finally:
            goes_on.set()
        done = retry.result()
    assert (done.status, joins) == ("completed", 1)
    assert done.file is not None
    assert client.files.content(done.file.id).read() == ROWS
    assert len(new_content(server, before)) == 1


def test_an_upload_whose_completing_crashed_after_its_file_was_there_has_that_file(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = begin(client, len(ROWS))
    part = client.uploads.parts.create(upload.id, data=ROWS)
    before = {file.id for file in client.files.list()}
    objects = file_store(server.parts.settings.files_url).objects
    put = objects.put

    def no_upload(name: str, content: bytes) -> None:
        if name.startswith("upload_"):
            raise InfrastructureError("files_unreachable", "the storage went away", suggestion="wait")
        put(name, content)

    with monkeypatch.context() as crash:
        crash.setattr(objects, "put", no_upload)
        with pytest.raises(openai.InternalServerError):
            client.with_options(max_retries=0).uploads.complete(upload.id, part_ids=[part.id])
    (file_id,) = {file.id for file in client.files.list()} - before
    with pytest.raises(openai.ConflictError):
        client.uploads.cancel(upload.id)
    done = client.uploads.complete(upload.id, part_ids=[part.id])
    assert (done.status, done.file and done.file.id) == ("completed", file_id)
    assert {file.id for file in client.files.list()} - before == {file_id}
    assert parts_of(upload, server) == []


def test_two_processes_that_complete_an_upload_at_once_make_one_file(client: openai.OpenAI, server: Server) -> None:
    upload = begin(client, len(ROWS))
    part = client.uploads.parts.create(upload.id, data=ROWS)
    before = stored(server)
    file = client.uploads.complete(upload.id, part_ids=[part.id]).file
    assert file is not None
    late = FileStore(server.parts.settings.files_url)  # of another process, which had joined the parts too
    new = late.new()
    new.write(ROWS)
    new.close()
    assert late.keep(new, file.filename, None, file.id).created_at == file.created_at
    assert len(new_content(server, before)) == 1


@pytest.mark.parametrize("overtakes", ["before the parts are listed", "while they are read"])
def test_completing_that_another_process_overtakes_answers_with_its_file(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch, overtakes: str
) -> None:
    upload = begin(client, len(ROWS))
    part = client.uploads.parts.create(upload.id, data=ROWS)
    objects, other = file_store(server.parts.settings.files_url).objects, FileStore(server.parts.settings.files_url)
    file_id = upload.id.replace("upload_", "file-")

    def complete() -> None:
        new = other.new()
        new.write(ROWS)
        new.close()
        other.keep(new, "f.jsonl", None, file_id)
        other.objects.delete(f"{upload.id}.{part.id}")

    def overtaken(call: Callable[..., Any]) -> Callable[..., Any]:
        def first_the_other(*arguments: Any) -> Any:
            if other.find(file_id) is None:
                complete()
            return call(*arguments)

        return first_the_other

    name = "sizes" if overtakes.startswith("before") else "read"
    monkeypatch.setattr(objects, name, overtaken(getattr(objects, name)))
    done = client.with_options(max_retries=0).uploads.complete(upload.id, part_ids=[part.id])
    assert (done.status, done.file and done.file.id) == ("completed", file_id)


def test_beginning_an_upload_makes_room_of_what_has_expired(serve: Serve) -> None:
    server = serve(files_quota_bytes=2000)
    store = file_store(server.parts.settings.files_url)
    with connected(server) as client:
        file = client.files.create(file=("rows.jsonl", ROWS * 5), purpose="fine-tune")
        record = store.get(file.id).model_copy(update={"expires_at": 1})
        store.objects.put(f"{file.id}.json", record.model_dump_json().encode())
        store._records.clear()
        store._swept = float("-inf")  # ten minutes have passed
        assert begin(client, 900).status == "pending"
        assert record.content not in stored(server)


def test_a_cancelled_upload_takes_no_part(client: openai.OpenAI) -> None:
    upload = begin(client)
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.uploads.parts.create(upload.id, data=b"{}")
    with pytest.raises(openai.ConflictError):
        client.uploads.complete(upload.id, part_ids=["part_x"])
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_none")


def test_an_upload_over_the_limit_is_a_413(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        begin(client, (4 << 20) + 1)
    assert refused.value.status_code == 413


def parts_of(upload: Any, server: Server) -> list[str]:
    return [name for name in stored(server) if name.startswith(f"{upload.id}.part_")]


def test_parts_hold_twice_what_was_announced_at_most(client: openai.OpenAI, server: Server) -> None:
    upload = begin(client, len(ROWS))
    client.uploads.parts.create(upload.id, data=ROWS)  # whose answer was lost, say
    again = client.uploads.parts.create(upload.id, data=ROWS)
    before = stored(server)
    for too_much in (b"x", b"x" * (1 << 20)):
        with pytest.raises(openai.APIStatusError) as refused:
            client.uploads.parts.create(upload.id, data=too_much)
        assert (refused.value.status_code, refused.value.code) == (413, "file_too_large")
    assert stored(server) == before
    assert client.uploads.complete(upload.id, part_ids=[again.id]).status == "completed"
    assert parts_of(upload, server) == []


class SlowPart:
    """A part whose bytes the server waits for until `end`."""

    def __init__(self, server: Server, upload: Any, data: bytes) -> None:
        self._goes_on = threading.Event()

        def body() -> Iterator[bytes]:
            yield b'--b\r\nContent-Disposition: form-data; name="data"; filename="p"\r\n\r\n'
            self._goes_on.wait()
            yield data + b"\r\n--b--\r\n"

        before = parts_of(upload, server)
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        self._pool = ThreadPoolExecutor(1)
        self._answer = self._pool.submit(
            httpx.post, f"{server.url}/v1/uploads/{upload.id}/parts", content=body(), headers=headers, timeout=60
        )
        eventually(lambda: parts_of(upload, server) != before, WAIT_S, lambda: "the part does not arrive")

    def end(self) -> httpx.Response:
        self._goes_on.set()
        self._pool.shutdown()
        return self._answer.result()


def test_parts_that_come_at_the_same_time_hold_no_more_either(client: openai.OpenAI, server: Server) -> None:
    upload = begin(client, 1000)
    slow = SlowPart(server, upload, b"x" * 1500)
    client.uploads.parts.create(upload.id, data=b"x" * 1500)
    kept = [name for name, size in file_store(server.parts.settings.files_url).objects.sizes().items() if size == 1500]
    answer = slow.end()
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
    assert parts_of(upload, server) == kept


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda client, upload, _: client.uploads.cancel(upload.id), "upload_cancelled"),
        (lambda client, upload, part: client.uploads.complete(upload.id, part_ids=[part.id]), "upload_completed"),
    ],
)
def test_a_part_that_arrives_after_the_end_of_its_upload_is_a_409_and_is_not_kept(
    client: openai.OpenAI, server: Server, end: Callable[[openai.OpenAI, Any, Any], Any], code: str
) -> None:
    upload = begin(client, len(ROWS))
    part = client.uploads.parts.create(upload.id, data=ROWS)
    slow = SlowPart(server, upload, b"late")
    end(client, upload, part)
    answer = slow.end()
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, code)
    assert parts_of(upload, server) == []


@pytest.mark.parametrize("again", ["cancel", "complete"])
def test_ending_an_upload_again_drops_the_parts_that_a_crash_left(
    client: openai.OpenAI, server: Server, again: str
) -> None:
    upload = begin(client, len(ROWS))
    part = client.uploads.parts.create(upload.id, data=ROWS)
    arguments = {"part_ids": [part.id]} if again == "complete" else {}
    end = getattr(client.uploads, again)
    done = end(upload.id, **arguments)
    file_store(server.parts.settings.files_url).objects.put(f"{upload.id}.{part.id}", ROWS)
    assert end(upload.id, **arguments) == done
    assert parts_of(upload, server) == []


def test_the_parts_of_an_upload_that_expired_make_room_for_others(client: openai.OpenAI, server: Server) -> None:
    store = file_store(server.parts.settings.files_url)
    now = time.time()
    old, young = (
        f"upload_{ULID.from_timestamp(now - age_s)}.part_{ULID()}"
        for age_s in (UPLOAD_LIFETIME_S + 1000, UPLOAD_LIFETIME_S - 1000)
    )
    for name in (old, young):
        store.objects.put(name, b"x")
    upload = begin(client)
    store._swept = float("-inf")  # ten minutes have passed
    client.uploads.parts.create(upload.id, data=b"{}")
    assert old not in stored(server)
    assert young in stored(server)


def test_an_upload_needs_room_for_its_parts_and_for_its_file(serve: Serve) -> None:
    server = serve(files_quota_bytes=10_000)
    size = 4000
    row = b'{"a": 1}\n'.ljust(size)
    with connected(server) as client:
        with pytest.raises(openai.RateLimitError):
            begin(client, 6000)
        upload = begin(client, size)
        part = client.uploads.parts.create(upload.id, data=row)
        other = client.files.create(file=("rows.jsonl", row), purpose="fine-tune")
        before = stored(server)
        with pytest.raises(openai.RateLimitError) as refused:
            client.uploads.complete(upload.id, part_ids=[part.id])
        assert refused.value.code == "quota_exceeded"
        assert stored(server) == before
        client.files.delete(other.id)
        assert client.uploads.complete(upload.id, part_ids=[part.id]).status == "completed"

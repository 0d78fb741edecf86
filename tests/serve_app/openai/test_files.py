"""Files through the real client."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import openai
import psutil
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from openai.types.file_create_params import ExpiresAfter
from ulid import ULID

from events.facts import CancelRequested, JobCancelled
from tests.serve_app.live_server import MODEL, Serve, Server
from tests.serve_app.openai.conftest import ROWS, connected, stored
from trainers.data.source import check_data_uri, open_lines
from trainers.errors import InfrastructureError
from trainers.files import LEFT_OVER_S, FileStore, NewObject, file_store

SOME_ULID = "01M8PYMR9ZB3488KSZ26EYG9R2"


@pytest.fixture
def upload(client: openai.OpenAI) -> Callable[..., Any]:
    def upload(content: bytes = ROWS, **changes: Any) -> Any:
        return client.files.create(file=("rows.jsonl", content), purpose="fine-tune", **changes)

    return upload


def test_a_file_is_there_under_its_id_until_it_is_deleted(client: openai.OpenAI, server: Server) -> None:
    before = stored(server)
    file = client.files.create(file=("täglich.jsonl", ROWS), purpose="fine-tune")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(ROWS), "täglich.jsonl", "fine-tune")
    assert file.id.startswith("file-")
    assert abs(file.created_at - time.time()) < 60
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == ROWS
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert stored(server) == before


def test_the_async_client_does_the_same(server: Server) -> None:
    async def journey() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            file = await client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
            assert (await client.files.content(file.id)).read() == ROWS
            assert file.id in [other.id async for other in client.files.list(limit=1)]
            assert (await client.files.delete(file.id)).deleted

    asyncio.run(journey())


def test_the_client_pages_through_all_files_in_either_order(client: openai.OpenAI, upload: Callable[..., Any]) -> None:
    made = [upload().id for _ in range(5)]
    newest = [file.id for file in client.files.list(limit=2, purpose="fine-tune")]
    assert [file_id for file_id in newest if file_id in made] == made[::-1]
    oldest = [file.id for file in client.files.list(limit=2, order="asc")]
    assert oldest == newest[::-1]


def test_a_raw_response_has_its_request_id(client: openai.OpenAI) -> None:
    raw = client.files.with_raw_response.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert raw.headers["x-request-id"]
    assert raw.parse().bytes == len(ROWS)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_the_next_page_comes_also_after_a_file_that_was_deleted_meanwhile(
    client: openai.OpenAI, upload: Callable[..., Any], order: Any
) -> None:
    files = [upload().id for _ in range(4)]
    expected = files if order == "asc" else files[::-1]
    listed = []
    for file in client.files.list(order=order, limit=1, purpose="fine-tune"):  # a page for each
        if file.id in files:
            listed.append(file.id)
            client.files.delete(file.id)
    assert listed == expected


def test_no_file_is_missed_after_one_that_was_uploaded_in_parts_and_deleted(
    client: openai.OpenAI, upload: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = client.uploads.create(bytes=len(ROWS), filename="x.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    between = upload().id
    part = client.uploads.parts.create(begun.id, data=ROWS)
    in_a_minute = time.time() + 60
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(time, "time", lambda: in_a_minute)
        joined = client.uploads.complete(begun.id, part_ids=[part.id]).file
    assert joined is not None
    listed = []
    for file in client.files.list(limit=1, purpose="fine-tune"):
        if file.id in (between, joined.id):
            listed.append(file.id)
            client.files.delete(file.id)
    assert sorted(listed) == sorted([between, joined.id])
    assert joined.created_at == int(in_a_minute)


def test_the_error_for_an_unknown_file_escapes_control_characters(server: Server) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        error = httpx.request(method, f"{server.url}/v1/files/x%1B[2J{path}").json()["error"]
        assert (error["code"], error["param"]) == ("file_not_found", "file_id")
        assert r"no file x\x1b[2J (" in error["message"]


@pytest.mark.parametrize("after", ["file-x", "file-" + "Z" * 26, SOME_ULID, f"file-results-ftjob-{SOME_ULID}"])
def test_after_must_be_the_id_of_a_file(client: openai.OpenAI, after: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.list(after=after)
    assert refused.value.code == "unknown_after"


def test_a_download_that_broke_off_goes_on_where_it_was_and_has_the_file_s_name(
    client: openai.OpenAI, server: Server, upload: Callable[..., Any]
) -> None:
    file = upload()
    url = f"{server.url}/v1/files/{file.id}/content"
    head = httpx.head(url)
    assert (head.status_code, int(head.headers["content-length"])) == (200, len(ROWS))
    assert head.headers["content-disposition"] == 'attachment; filename="rows.jsonl"'
    part = httpx.get(url, headers={"Range": "bytes=10-", "If-Range": head.headers["etag"]})
    assert (part.status_code, part.content) == (206, ROWS[10:])
    assert part.headers["content-range"] == f"bytes 10-{len(ROWS) - 1}/{len(ROWS)}"
    assert httpx.get(url, headers={"Range": "bytes=10-", "If-Range": '"another"'}).content == ROWS
    named = client.files.create(file=("né 1.jsonl", ROWS), purpose="fine-tune")
    answer = httpx.get(f"{server.url}/v1/files/{named.id}/content")
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''n%C3%A9%201.jsonl"


def test_a_file_expires(client: openai.OpenAI, server: Server, upload: Callable[..., Any]) -> None:
    file = upload(expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    store = file_store(server.parts.settings.files_url)
    record = store.get(file.id)
    store.objects.put(f"{file.id}.json", record.model_copy(update={"expires_at": 1}).model_dump_json().encode())
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    store._records.clear()  # a process that has not seen it yet
    store.sweep({file.id}, every_s=0)
    assert f"{file.id}.json" in stored(server)  # a job works with it
    store.sweep(set(), every_s=0)
    assert {f"{file.id}.json", record.content}.isdisjoint(stored(server))


def test_what_a_crash_left_is_collected_after_a_day_and_not_before(server: Server) -> None:
    store = file_store(server.parts.settings.files_url)
    old, new = "bytes-01H00000000000000000000000", store.new()
    new.close()
    store.objects.put(old, b"x")
    store.sweep(set(), every_s=0)
    assert old not in stored(server)
    assert new.name in stored(server)
    new.abandon()


def test_the_sweep_reads_records_again_before_it_deletes_bytes(tmp_path: Path) -> None:
    """Of two processes that complete an upload at once, the second may have written its record over the first's."""
    store, file_id = FileStore(str(tmp_path)), f"file-{ULID()}"
    made = [NewObject(store.objects, f"bytes-{ULID.from_timestamp(time.time() - LEFT_OVER_S - 60)}") for _ in range(2)]
    for new in made:
        new.write(ROWS)
        new.close()
    first = store.keep(made[0], "f.jsonl", None, file_id)
    assert store.files() == [first]
    second = first.model_copy(update={"content": made[1].name})
    store.objects.put(f"{file_id}.json", second.model_dump_json().encode())
    for _ in range(2):
        store.sweep(in_use=(), every_s=0)
    assert set(store.objects.sizes()) == {f"{file_id}.json", made[1].name}
    assert b"".join(store.read(store.get(file_id))) == ROWS


def test_a_file_whose_record_can_not_be_written_leaves_nothing(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(server)

    def fails(_name: str, _content: bytes) -> None:
        raise InfrastructureError("files_unreachable", "the storage went away", suggestion="wait")

    with monkeypatch.context() as failing:
        failing.setattr(file_store(server.parts.settings.files_url).objects, "put", fails)
        with pytest.raises(openai.InternalServerError):
            client.with_options(max_retries=0).files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert stored(server) == before


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "file_empty"),
        (b"\n \n", "file_empty"),
        (b"a,b\n1,2\n", "not_jsonl"),
        (b"[1]", "not_jsonl"),
        (ROWS.decode().encode("utf-16"), "not_jsonl"),  # which some shells write
    ],
)
def test_a_file_that_is_not_jsonl_is_a_400_and_leaves_nothing(
    server: Server, upload: Callable[..., Any], content: bytes, code: str
) -> None:
    before = stored(server)
    with pytest.raises(openai.BadRequestError) as refused:
        upload(content)
    assert refused.value.code == code
    assert stored(server) == before


def test_another_purpose_or_field_or_expiry_is_a_400_that_names_it(client: openai.OpenAI, server: Server) -> None:
    before = stored(server)
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("rows.jsonl", ROWS), purpose="assistants")
    assert refused.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune", extra_body={"colour": "red"})
    assert refused.value.param == "colour"
    for seconds in (10, 10**9, "soon"):
        expiry: Any = {"anchor": "created_at", "seconds": seconds}  # also what the client's types refuse
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune", expires_after=expiry)
        assert refused.value.param == "expires_after.seconds"
    assert stored(server) == before


def test_a_file_over_the_limit_is_a_413_whether_or_not_it_says_so(client: openai.OpenAI, server: Server) -> None:
    before = stored(server)
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("rows.jsonl", ROWS + b" " * (2 << 20)), purpose="fine-tune")
    assert refused.value.status_code == 413
    assert refused.value.code == "file_too_large"

    def unsaid() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(20):
            yield b" " * 100_000

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert httpx.post(f"{server.url}/v1/files", content=unsaid(), headers=headers).status_code == 413
    assert stored(server) == before


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_form"),
        (b"no boundary", "invalid_form"),
        (b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\ncut', "invalid_form"),
        (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n', "missing"),
    ],
)
def test_an_invalid_form_is_refused(server: Server, body: bytes, code: str) -> None:
    before = stored(server)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = httpx.post(f"{server.url}/v1/files", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == code
    for headers in ({}, {"Content-Type": "multipart/form-data"}):  # without the boundary, as one makes it by hand
        answer = httpx.post(f"{server.url}/v1/files", content=b"x", headers=headers)
        assert answer.status_code == 415
        assert "with its boundary" in answer.json()["error"]["message"]
    assert stored(server) == before


def test_a_page_of_files_that_takes_long_ends_early_and_the_client_goes_on(
    client: openai.OpenAI, upload: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {upload().id for _ in range(3)}
    whole = [file.id for file in client.files.list()]
    monkeypatch.setattr("serve_app.openai.files.PAGE_S", -1.0)
    page = client.files.list()
    assert (len(page.data), page.has_more) == (1, True)
    assert [file.id for file in client.files.list()] == whole
    assert made <= set(whole)


def test_the_quota_is_for_all_files_and_is_not_tried_again(serve: Serve) -> None:
    server = serve(files_quota_bytes=2000)
    with connected(server) as client:
        client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        before = stored(server)
        with pytest.raises(openai.RateLimitError) as refused:
            client.files.create(file=("rows.jsonl", ROWS * 6), purpose="fine-tune")
        assert refused.value.code == "quota_exceeded"
        assert refused.value.response.headers["x-should-retry"] == "false"
        assert refused.value.request.headers["x-stainless-retry-count"] == "0"
        assert stored(server) == before


def test_a_file_in_use_can_not_be_deleted(client: openai.OpenAI, server: Server, create: Callable[..., Any]) -> None:
    job = create()
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(job.training_file)
    assert refused.value.code == "file_in_use"
    assert refused.value.response.headers["x-should-retry"] == "false"
    server.append(job.id, CancelRequested(), JobCancelled())
    assert client.files.delete(job.training_file).deleted


def test_our_own_api_takes_a_file_by_its_id(server: Server, upload: Callable[..., Any]) -> None:
    file = upload()
    answer = httpx.post(f"{server.url}/fine_tuning/jobs/submit", json={"model": MODEL, "data": file.id})
    assert answer.json()["input_config"]["data"] == file.id
    missing = "file-" + "0" * 26
    answer = httpx.post(f"{server.url}/fine_tuning/jobs/submit", json={"model": MODEL, "data": missing})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "file_not_found"


def test_files_may_lie_in_an_object_store(serve: Serve) -> None:
    server = serve(files="memory://bucket/files")
    with connected(server) as client:
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        assert client.files.content(file.id).read() == ROWS
        assert len(fsspec.filesystem("memory").ls("/bucket/files")) == 2
        client.files.delete(file.id)
        assert client.files.list().data == []


UNREACHABLE = "ftp://127.0.0.1:9/files"  # nobody listens on port 9


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/files", {}),
        ("GET", f"/v1/files/file-{'0' * 26}", {}),
        ("GET", f"/v1/files/file-{'0' * 26}/content", {}),
        ("DELETE", f"/v1/files/file-{'0' * 26}", {}),
        ("POST", "/v1/files", {"files": {"file": ("rows.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}),
        ("POST", f"/v1/uploads/upload_{'0' * 26}/cancel", {}),
        ("POST", "/fine_tuning/jobs/submit", {"json": {"model": MODEL, "data": f"file-{'0' * 26}"}}),
    ],
)
def test_a_storage_that_can_not_be_reached_is_a_503_that_says_what_to_do(
    unreachable: Server, caplog: pytest.LogCaptureFixture, method: str, path: str, body: dict[str, Any]
) -> None:
    answer = httpx.request(method, unreachable.url + path, **body)
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("service_unavailable_error", "files_unreachable")
    assert "Connection refused" in error["message"]
    assert "TUNEWRIGHT_FILES" in error["message"]
    assert "127.0.0.1" not in error["message"]
    assert answer.headers["retry-after"]
    logged = [record.getMessage() for record in caplog.records if record.name == "tunewright.files"]
    assert logged
    assert all("Connection refused" in message and "files.py" in message for message in logged)


@pytest.fixture(scope="module")
def unreachable(serve: Serve) -> Server:
    return serve(files=UNREACHABLE)


def test_a_file_whose_upload_was_answered_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record has its name on disk, and its bytes have theirs."""
    on_disk, fsync = list[tuple[Path, set[str]]](), os.fsync

    def seen(descriptor: int) -> None:
        fsync(descriptor)
        file = Path(f"/proc/self/fd/{descriptor}").readlink()
        on_disk.append((file, {path.name for path in tmp_path.iterdir()}))

    monkeypatch.setattr(os, "fsync", seen)
    store = FileStore(str(tmp_path))
    new = store.new()
    new.write(ROWS)
    new.close()
    file = store.keep(new, "rows.jsonl", None)
    assert on_disk[-1] == (tmp_path, {f"{file.id}.json", new.name})


def test_a_storage_without_room_is_a_503_and_nothing_is_left(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(server)
    store = file_store(server.parts.settings.files_url)

    def full(_name: str) -> Any:
        return Path("/dev/full").open("wb", buffering=0)  # the kernel's own full disk

    monkeypatch.setattr(store.objects._fs, "open", lambda path, *_, **__: full(path))
    answer = httpx.post(
        f"{server.url}/v1/files", files={"file": ("rows.jsonl", ROWS)}, data={"purpose": "fine-tune"}, timeout=30
    )
    monkeypatch.undo()
    assert answer.status_code == 503, answer.text
    assert "No space left on device" in answer.json()["error"]["message"]
    assert stored(server) == before


class Hanging(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A storage that doesn't answer until `goes_on`."""

    protocol = "hanging"
    asked = threading.Semaphore(0)
    goes_on = threading.Event()

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.asked.release()
        self.goes_on.wait()
        return super().ls(path, detail, **options)


def test_a_storage_that_hangs_holds_up_no_submit(serve: Serve) -> None:
    fsspec.register_implementation("hanging", Hanging)
    server = serve(files="hanging://bucket/files")
    storage = server.parts.settings.storage
    callers = [
        threading.Thread(target=httpx.get, args=(f"{server.url}/v1/files",), kwargs={"timeout": None})
        for _ in range(40)
    ]
    try:
        for caller in callers:
            caller.start()
        for _ in callers:
            assert Hanging.asked.acquire(timeout=60)
        config = {"model": MODEL, "data": str(storage / "rows.jsonl")}
        assert httpx.post(f"{server.url}/fine_tuning/jobs/submit", json=config, timeout=60).status_code == 200
    finally:
        Hanging.goes_on.set()
        for caller in callers:
            caller.join()


def test_513_megabytes_are_refused_before_they_are_sent(serve: Serve, tmp_path: Path) -> None:
    server = serve()  # with the limit as it is unless it is set: 512 MiB
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
    with (tmp_path / "large.jsonl").open("wb") as large:
        large.truncate(513 << 20)
    before = time.monotonic()
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=tmp_path / "large.jsonl", purpose="fine-tune")
    assert (refused.value.status_code, refused.value.code) == (413, "file_too_large")
    assert str(512 << 20) in refused.value.message
    assert time.monotonic() - before < 60
    assert client.files.list().data == []


def test_memory_does_not_grow_with_a_file(serve: Serve) -> None:
    """The server runs in this process, and the client sends from a generator: neither may hold the file."""
    server = serve(max_file_bytes=1 << 30)
    row = ROWS * 2000
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    most = 0

    def body() -> Iterator[bytes]:
        nonlocal most
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(300_000_000 // len(row)):
            yield row
            most = max(most, process.memory_info().rss)
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = httpx.post(f"{server.url}/v1/files", content=body(), headers=headers, timeout=120)
    assert answer.json()["bytes"] > 250_000_000
    assert most - before < 60_000_000
    with connected(server) as client:
        client.files.delete(answer.json()["id"])


@pytest.mark.parametrize("files", [None, "memory://elsewhere/files"])
def test_a_job_reads_the_rows_that_were_uploaded_also_when_the_file_expires_meanwhile(
    serve: Serve, files: str | None
) -> None:
    server = serve(files=files)
    settings = server.parts.settings
    with connected(server) as client:
        expiry: ExpiresAfter = {"anchor": "created_at", "seconds": 3600}
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune", expires_after=expiry)
    store = file_store(settings.files_url)
    expired = store.get(file.id).model_copy(update={"expires_at": 1})
    store.objects.put(f"{file.id}.json", expired.model_dump_json().encode())
    assert [line for _, line in open_lines(check_data_uri(file.id, settings))] == ROWS.splitlines()

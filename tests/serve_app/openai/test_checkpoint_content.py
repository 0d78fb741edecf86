"""Downloads of checkpoints."""

import io
import os
import shutil
import socket
import tarfile
import tracemalloc
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from safetensors.numpy import load_file

from tests.serve_app.live_server import MODEL, Server
from tests.tiny_models import make_tiny_model
from tests.waiting import eventually
from trainers.models.architecture import inspect_model_dir

BIG = 64 << 20


@pytest.fixture
def job_id(server: Server) -> str:
    """A running job with two checkpoints on disk: step 1 as from LoRA, step 2 as from full fine-tuning."""
    job_id = server.submit()
    lora, full = server.train(job_id, 1, 2).values()
    make_tiny_model(lora / "merged", seed=1)
    make_tiny_model(lora / "adapter", seed=2)
    make_tiny_model(full, seed=3)
    (full / "additional_chat_templates").mkdir()
    (full / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for checkpoint in (lora, full):
        (checkpoint / "training_state").mkdir()
        (checkpoint / "training_state" / "optimizer.safetensors").write_bytes(b"secret")
    return job_id


def checkpoint(client: openai.OpenAI, job_id: str, step: int) -> tuple[str, Path]:
    """The id and the directory of the job's checkpoint at `step`."""
    (found,) = (one for one in client.fine_tuning.jobs.checkpoints.list(job_id) if one.step_number == step)
    return found.id, Path(found.model_dump()["uri"].removeprefix("file://"))


def grow(path: Path) -> None:
    """Makes the weights of the checkpoint a large, sparse file."""
    with (path / "merged" / "model.safetensors").open("r+b") as file:
        file.truncate(BIG)


def held(path: Path) -> bool:
    """Whether this process, which the server runs in, has a file open below `path`."""
    return any(Path(file.path).is_relative_to(path) for file in psutil.Process().open_files())


def bytes_read() -> int:
    """Bytes that this process has read so far, from files and sockets."""
    return int(Path("/proc/self/io").read_text().split()[1])


def url(server: Server, checkpoint_id: str) -> str:
    return f"{server.url}/v1/fine_tuning/checkpoints/{checkpoint_id}/content"


@pytest.mark.parametrize(
    ("step", "variant", "below", "name"),
    [(1, None, "merged", "step-1-merged"), (1, "adapter", "adapter", "step-1-adapter"), (2, "merged", "", "step-2")],
)
def test_a_checkpoint_unpacks_to_its_directory_bit_for_bit(
    server: Server,
    client: openai.OpenAI,
    job_id: str,
    tmp_path: Path,
    step: int,
    variant: str | None,
    below: str,
    name: str,
) -> None:
    checkpoint_id, path = checkpoint(client, job_id, step)
    answer = httpx.get(url(server, checkpoint_id), params={"variant": variant} if variant else {})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-disposition"] == f'attachment; filename="{job_id}-{name}.tar"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert all(member.isfile() and member.mode == 0o644 for member in tar)
        tar.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert unpacked.name == f"{job_id}-{name}"
    sent = {file.relative_to(unpacked): file.read_bytes() for file in unpacked.rglob("*") if file.is_file()}
    kept = {file.relative_to(path / below): file.read_bytes() for file in (path / below).rglob("*") if file.is_file()}
    assert sent == {name: data for name, data in kept.items() if name.parts[0] != "training_state"}
    inspect_model_dir(unpacked)
    tensors = load_file(unpacked / "model.safetensors")
    assert all((tensors[name] == value).all() for name, value in load_file(path / below / "model.safetensors").items())


def test_a_checkpoint_is_found_by_every_name_it_has(server: Server, client: openai.OpenAI, job_id: str) -> None:
    (full, _) = client.fine_tuning.jobs.checkpoints.list(job_id)
    by_id, by_name = (httpx.get(url(server, name)) for name in (full.id, full.fine_tuned_model_checkpoint))
    assert by_id.content == by_name.content


def test_a_full_fine_tuning_has_no_adapter(server: Server, client: openai.OpenAI, job_id: str) -> None:
    checkpoint_id, _ = checkpoint(client, job_id, 2)
    answer = httpx.get(url(server, checkpoint_id), params={"variant": "adapter"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "no_adapter", "variant")


def test_a_checkpoint_that_is_gone_or_never_was_is_a_404(server: Server, client: openai.OpenAI, job_id: str) -> None:
    checkpoint_id, path = checkpoint(client, job_id, 1)
    shutil.rmtree(path)
    for variant in ("merged", "adapter"):
        answer = httpx.get(url(server, checkpoint_id), params={"variant": variant})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "checkpoint_deleted")
    for name in ("ftckpt_0-1", MODEL, "x"):
        assert httpx.get(url(server, name)).status_code == 404
    assert httpx.get(url(server, checkpoint_id), params={"variant": "base"}).status_code == 400


def test_a_download_is_whole_though_the_checkpoint_is_deleted_meanwhile_and_takes_no_memory(
    server: Server, client: openai.OpenAI, job_id: str
) -> None:
    checkpoint_id, path = checkpoint(client, job_id, 1)
    grow(path)
    tracemalloc.start()
    try:
        with httpx.stream("GET", url(server, checkpoint_id)) as answer:
            received = 0
            for chunk in answer.iter_raw(1 << 16):
                if not received:
                    shutil.rmtree(path)
                received += len(chunk)
            _, peak = tracemalloc.get_traced_memory()  # of the server, too: it is in this process
    finally:
        tracemalloc.stop()
    assert received == int(answer.headers["content-length"]) > BIG
    assert peak < BIG / 4


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("0-0", 0, 0),
        ("511-513", 511, 513),  # the end of a header in the tar, and the beginning of its file
        ("700-", 700, None),
        ("3-99999999999999", 3, None),
        ("-1500", -1500, None),  # the end of the tar, and of the last file in it
        ("-99999999999999", 0, None),
    ],
)
def test_a_download_that_broke_off_goes_on_where_it_was(
    server: Server, client: openai.OpenAI, job_id: str, asked: str, first: int, last: int | None
) -> None:
    checkpoint_id, _ = checkpoint(client, job_id, 1)
    whole = httpx.get(url(server, checkpoint_id))
    assert whole.headers["accept-ranges"] == "bytes"
    headers = {"Range": f"bytes={asked}", "If-Range": whole.headers["etag"]}
    part = httpx.get(url(server, checkpoint_id), headers=headers)
    size = len(whole.content)
    first, end = first % size, size if last is None else last + 1
    assert (part.status_code, part.content) == (206, whole.content[first:end])
    assert part.headers["content-range"] == f"bytes {first}-{end - 1}/{size}"
    assert part.headers["etag"] == whole.headers["etag"]


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,3-4", "bytes=5-3", "bytes=-", "bytes=x", "lines=1-2", f"bytes={'9' * 99}-"]
)
def test_anything_but_a_single_range_gets_the_whole(
    server: Server, client: openai.OpenAI, job_id: str, asked: str
) -> None:
    checkpoint_id, _ = checkpoint(client, job_id, 1)
    answer = httpx.get(url(server, checkpoint_id), headers={"Range": asked})
    assert (answer.status_code, len(answer.content)) == (200, int(answer.headers["content-length"]))
    assert "content-range" not in answer.headers


def test_what_was_begun_with_other_bytes_is_sent_from_the_beginning(
    server: Server, client: openai.OpenAI, job_id: str
) -> None:
    checkpoint_id, path = checkpoint(client, job_id, 1)
    etag = httpx.head(url(server, checkpoint_id)).headers["etag"]
    weights = path / "merged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    os.utime(weights, (1, 1))
    answer = httpx.get(url(server, checkpoint_id), headers={"Range": "bytes=9-", "If-Range": etag})
    assert answer.status_code == 200
    assert answer.headers["etag"] != etag


def test_a_range_beyond_the_end_is_refused_with_the_size_and_leaves_no_file_open(
    server: Server, client: openai.OpenAI, job_id: str
) -> None:
    checkpoint_id, path = checkpoint(client, job_id, 1)
    size = int(httpx.head(url(server, checkpoint_id)).headers["content-length"])
    for asked in (f"{size}-", "-0"):
        answer = httpx.get(url(server, checkpoint_id), headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{size}"  # by which curl -C - knows that it has all of it
    assert not held(path)


def test_a_head_tells_what_a_download_would_and_reads_nothing(
    server: Server, client: openai.OpenAI, job_id: str
) -> None:
    checkpoint_id, path = checkpoint(client, job_id, 1)
    grow(path)
    before = bytes_read()
    answer = httpx.head(url(server, checkpoint_id), headers={"Range": "bytes=5-"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > BIG
    assert bytes_read() - before < BIG / 4
    assert not held(path)


def test_what_lies_before_a_range_is_not_read(server: Server, client: openai.OpenAI, job_id: str) -> None:
    checkpoint_id, path = checkpoint(client, job_id, 1)
    grow(path)
    before = bytes_read()
    assert len(httpx.get(url(server, checkpoint_id), headers={"Range": "bytes=-2000"}).content) == 2000
    assert bytes_read() - before < BIG / 4


def test_a_client_that_goes_away_leaves_no_file_open(server: Server, client: openai.OpenAI, job_id: str) -> None:
    checkpoint_id, path = checkpoint(client, job_id, 1)
    grow(path)

    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        route = url(server, checkpoint_id).removeprefix(server.url)
        connection.sendall(f"GET {route} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(1 << 16)
        assert held(path)
    eventually(lambda: not held(path), 60, lambda: "a file is still open")

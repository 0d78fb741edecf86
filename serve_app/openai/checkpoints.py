"""/v1/fine_tuning/checkpoints/{id}/content: a checkpoint's weights, as one download."""

import hashlib
import io
import os
import tarfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import Response

from serve_app.download import download
from serve_app.errors import Answer, RequestRefused
from serve_app.openai.tuned import Checkpoint, checkpoint_of, unknown_model
from serve_app.openapi import documented_bytes
from serve_app.routes import TheBackend
from trainers.errors import Problem
from trainers.resubmit import model_dir_of, step_of

router = APIRouter(prefix="/v1", default_response_class=Response)
Variant = Literal["merged", "adapter"]
MEDIA_TYPE = "application/x-tar"
CHUNK = 1 << 20
_END = b"\0" * 2 * tarfile.BLOCKSIZE
_DIRECTORIES = ("additional_chat_templates",)
"""Subdirectories that are part of a model in Hugging Face layout."""


@router.get(
    "/fine_tuning/checkpoints/{checkpoint_id:path}/content",  # the suffix in a model's name may have a '/'
    summary="Download a checkpoint's weights",
    responses=documented_bytes("A tar of the checkpoint's directory.", 400, 404, 409, media_type=MEDIA_TYPE),
)
async def content(
    request: Request,
    backend: TheBackend,
    checkpoint_id: Annotated[
        str, InPath(min_length=1, max_length=1024, description="The checkpoint's id, or the name of a tuned model.")
    ],
    variant: Annotated[
        Variant, Query(description="The whole model, or (of LoRA, DoRA and QLoRA) the adapter in PEFT's layout.")
    ] = "merged",
) -> Response:
    """A directory in Hugging Face layout, as a tar: weights in safetensors, configs, tokenizer. No training state.

    A download that has begun is not affected if the checkpoint is deleted meanwhile. One that broke off resumes with
    `Range`, as `curl -C -` does it.
    """
    found = await checkpoint_of(backend.log, checkpoint_id)
    if found is None:
        raise unknown_model(f"there is no checkpoint {checkpoint_id[:300]!a}", "checkpoint_not_found")
    archive = await to_thread.run_sync(_open, found, variant)
    return download(
        request,
        archive.read,
        size=archive.size,
        etag=archive.etag,
        media_type=MEDIA_TYPE,
        filename=f"{archive.name}.tar",
        close=archive.close,
    )


class _Archive:
    """A tar of open files, which are read while it is sent. The same files always give the same bytes."""

    def __init__(self, name: str, directory: Path) -> None:
        """`name` is the directory's name in the tar. Raises OSError if a file is gone."""
        self.name = name
        self._parts: list[tuple[BinaryIO, int]] = []
        """The files, and the headers and padding between them, each with its size."""
        state = hashlib.sha256()
        with ExitStack() as stack:
            padding = b""
            for path in _files(directory):
                file = stack.enter_context(path.open("rb"))
                found = os.fstat(file.fileno())
                header = _header(f"{name}/{path.relative_to(directory)}", found.st_size)
                self._parts += [_in_memory(padding + header), (file, found.st_size)]
                padding = b"\0" * (-found.st_size % tarfile.BLOCKSIZE)
                state.update(header + f"{found.st_mtime_ns}".encode())
            self._parts.append(_in_memory(padding + _END))
            self._files = stack.pop_all()
        self.size = sum(size for _, size in self._parts)
        self.etag = state.hexdigest()[:32]

    async def read(self, start: int) -> AsyncGenerator[bytes, None]:
        for file, size in self._parts:
            left = max(size - start, 0)
            if left:
                await to_thread.run_sync(file.seek, start)
            start = max(start - size, 0)
            while left:
                chunk = await to_thread.run_sync(file.read, min(left, CHUNK))
                if not chunk:
                    raise EOFError(f"{file.name} became shorter while it was sent")
                left -= len(chunk)
                yield chunk

    def close(self) -> None:
        self._files.close()


def _open(found: Checkpoint, variant: Variant) -> _Archive:
    model = model_dir_of(found.uri)
    merged = model.name == "merged"
    try:
        if variant == "merged":
            return _Archive(f"{found.name}-merged" if merged else found.name, model)
        adapter = model.with_name("adapter")
        if merged and adapter.is_dir():
            return _Archive(f"{found.name}-adapter", adapter)
        if model.is_dir():
            raise _no_adapter(found)
    except FileNotFoundError:
        pass  # deleted while it was opened
    message = f"the checkpoint of step {step_of(found.uri)} of {found.job.job_id} is no longer in the storage directory"
    raise unknown_model(message, "checkpoint_deleted")


def _no_adapter(found: Checkpoint) -> RequestRefused:
    message = f"{found.job.job_id} did not train an adapter; leave variant out to download the model"
    problem = Problem("variant", message, "no_adapter")
    return RequestRefused(Answer(400, "invalid_request_error", "no_adapter", message, "variant", [problem]))


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.is_file():
            yield path
        elif path.name in _DIRECTORIES:
            yield from sorted(inner for inner in path.iterdir() if inner.is_file())


def _header(name: str, size: int) -> bytes:
    """A tar header without owner and time, which would tell something about this machine."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _in_memory(data: bytes) -> tuple[BinaryIO, int]:
    return io.BytesIO(data), len(data)

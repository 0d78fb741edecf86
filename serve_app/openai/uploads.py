"""/v1/uploads: uploads in parts, for files that are too large for one request.

An upload is a record beside the files, `<upload id>.json`, and its parts are objects `<upload id>.<part id>`.
Completing it copies the parts, in a stream, to one object, and makes a file of that. The file's id follows from the
upload's: however often completing is tried or interrupted, there is one file.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, TypeAdapter
from ulid import ULID

from serve_app.errors import Answer, RequestRefused
from serve_app.openai.files import in_use, keep, room_for, shown, store_of
from serve_app.openai.multipart import Limit, receive
from serve_app.openai.objects import (
    OpenAIPartForm,
    OpenAIUpload,
    OpenAIUploadCompletion,
    OpenAIUploadPart,
    OpenAIUploadRequest,
)
from serve_app.openapi import documented, form_body, json_body
from serve_app.routes import TheBackend, received
from trainers.errors import InfrastructureError, Problem
from trainers.files import UPLOAD_LIFETIME_S, File, FileStore, NewObject
from trainers.settings import Settings

router = APIRouter(prefix="/v1", default_response_class=Response)
PART_BYTES = 64 << 20
PARTS_FACTOR = 2
"""Parts may hold this many times the bytes announced: a part whose answer was lost is sent again, and stored twice."""
UploadId = Annotated[str, Path(min_length=1, max_length=64, description="The upload's id.")]


class _Upload(BaseModel):
    """The record of an upload: how it is shown, and the request that began it."""

    shown: OpenAIUpload
    request: OpenAIUploadRequest


_RECORD: TypeAdapter[_Upload] = TypeAdapter(_Upload)
_ending: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""By upload id: a lock that is held while the upload is completed or cancelled. It exists while somebody uses it."""
_tasks: set[asyncio.Task[_Upload]] = set()
"""The tasks that complete or cancel an upload. The event loop keeps only weak references to them."""


@router.post(
    "/uploads",
    summary="Begin an upload in parts",
    openapi_extra=json_body(OpenAIUploadRequest),
    responses=documented(OpenAIUpload, "The upload was created, and takes parts.", 400, 413, 415, 429),
)
async def create(request: Request, backend: TheBackend) -> Response:
    """Begin to upload a file in parts of at most 64 MiB each, TUNEWRIGHT_MAX_UPLOAD_BYTES (8 GiB) together.

    The upload expires after an hour. Until it is complete, it needs room for twice its bytes: as parts, and joined.
    """
    asked = await received(OpenAIUploadRequest, request, backend)
    if asked.bytes > backend.settings.max_upload_bytes:
        message = f"bytes: an upload may hold {backend.settings.max_upload_bytes} bytes"
        raise RequestRefused(Answer(413, "invalid_request_error", "file_too_large", message, "bytes"))
    store = await store_of(backend.settings)
    await asyncio.to_thread(store.sweep, await in_use(backend.log))
    await room_for(store, backend.settings, 2 * asked.bytes)
    now = int(time.time())
    upload = OpenAIUpload(
        id=f"upload_{ULID()}",
        bytes=asked.bytes,
        created_at=now,
        expires_at=now + UPLOAD_LIFETIME_S,
        filename=asked.filename,
        purpose=asked.purpose,
        status="pending",
    )
    await _write(store, _Upload(shown=upload, request=asked))
    return JSONResponse(upload.model_dump(mode="json"))


@router.post(
    "/uploads/{upload_id}/parts",
    summary="Add a part",
    openapi_extra=form_body(OpenAIPartForm),
    responses=documented(OpenAIUploadPart, "The part was stored.", 400, 404, 409, 413, 415, 429),
)
async def add_part(request: Request, backend: TheBackend, upload_id: UploadId) -> Response:
    """Add bytes, as multipart/form-data. Parts may be sent at the same time; `part_ids` gives their order later.

    Together they may hold twice what was announced, so that one whose answer was lost can be sent again.
    """
    store = await store_of(backend.settings)
    await asyncio.to_thread(store.sweep, await in_use(backend.log))
    most = min(PART_BYTES, await _left(store, upload_id))
    limit = Limit(most, "the parts of an upload may together hold twice the bytes it announced")
    await room_for(store, backend.settings, 0)
    part_id = f"part_{ULID()}"
    new = await asyncio.to_thread(NewObject, store.objects, f"{upload_id}.{part_id}")
    await receive(request, "data", new, limit)
    try:
        await _left(store, upload_id)  # it may be over by now, or other parts have arrived
    except BaseException:
        await asyncio.shield(asyncio.to_thread(new.abandon))
        raise
    part = OpenAIUploadPart(id=part_id, created_at=int(time.time()), upload_id=upload_id)
    return JSONResponse(part.model_dump(mode="json"))


@router.post(
    "/uploads/{upload_id}/complete",
    summary="Complete an upload",
    openapi_extra=json_body(OpenAIUploadCompletion),
    responses=documented(OpenAIUpload, "The upload, with its file.", 400, 404, 409, 413, 415, 429),
)
async def complete(request: Request, backend: TheBackend, upload_id: UploadId) -> Response:
    """Join the parts to a file. If its size is not the announced one, or its md5 not the given one, the upload stays as
    it was. Completing a completed upload returns it.

    If you give up waiting, the work goes on: ask again, and you get the answer when it is done.
    """
    asked = await received(OpenAIUploadCompletion, request, backend)
    store = await store_of(backend.settings)
    upload = await _exclusively(upload_id, _complete(store, backend.settings, upload_id, asked))
    return JSONResponse(upload.shown.model_dump(mode="json"))


async def _complete(store: FileStore, settings: Settings, upload_id: str, asked: OpenAIUploadCompletion) -> _Upload:
    upload = await _read(store, upload_id)
    if upload.shown.status != "completed":
        _require_pending(upload.shown)
        await room_for(store, settings, upload.shown.bytes)
        try:
            new = await asyncio.to_thread(_joined, store, upload.shown, asked)
        except (RequestRefused, InfrastructureError):
            upload = await _read(store, upload_id)
            if upload.shown.status != "completed":  # else another replica completed it and deleted the parts
                raise
        else:
            file = await keep(store, new, upload.shown.filename, upload.request.expires_after, _file_id(upload_id))
            upload = _completed(upload, file)
    await _write(store, upload)
    await asyncio.to_thread(_drop_parts, store, upload_id)
    return upload


@router.post(
    "/uploads/{upload_id}/cancel",
    summary="Cancel an upload",
    responses=documented(OpenAIUpload, "The upload was cancelled.", 400, 404, 409),
)
async def cancel(backend: TheBackend, upload_id: UploadId) -> Response:
    """Delete the parts. Cancelling a cancelled upload returns it."""
    store = await store_of(backend.settings)
    upload = await _exclusively(upload_id, _cancel(store, upload_id))
    return JSONResponse(upload.shown.model_dump(mode="json"))


async def _cancel(store: FileStore, upload_id: str) -> _Upload:
    upload = await _read(store, upload_id)
    if upload.shown.status != "cancelled":
        _require_pending(upload.shown)
        upload = upload.model_copy(update={"shown": upload.shown.model_copy(update={"status": "cancelled"})})
        await _write(store, upload)
    await asyncio.to_thread(_drop_parts, store, upload_id)
    return upload


async def _exclusively(upload_id: str, ending: Coroutine[Any, Any, _Upload]) -> _Upload:
    """Runs `ending` while nothing else in this process completes or cancels the upload, and returns its result.

    Once started it runs to its end, even if the request is cancelled, because its threads can't be stopped. The next
    request for this upload waits for it.
    """
    lock = _ending.setdefault(upload_id, asyncio.Lock())
    try:
        await lock.acquire()
    except BaseException:
        ending.close()
        raise
    task = asyncio.create_task(ending)
    _tasks.add(task)

    def over(task: asyncio.Task[_Upload]) -> None:
        _tasks.discard(task)
        lock.release()

    task.add_done_callback(over)
    return await asyncio.shield(task)


async def _left(store: FileStore, upload_id: str) -> int:
    """Bytes that further parts may hold. Raises RequestRefused: 409 if the upload is over, 413 if its parts hold too
    much already."""
    upload = (await _read(store, upload_id)).shown
    _require_pending(upload)
    stored = sum((await asyncio.to_thread(_parts, store, upload_id)).values())
    if stored > PARTS_FACTOR * upload.bytes:
        message = f"data: the parts would hold {stored} bytes, {upload.bytes} were announced"
        raise RequestRefused(Answer(413, "invalid_request_error", "file_too_large", message, "data"))
    return PARTS_FACTOR * upload.bytes - stored


def _joined(store: FileStore, upload: OpenAIUpload, asked: OpenAIUploadCompletion) -> NewObject:
    """Copies the parts, in their order, to one object, and closes it. Raises RequestRefused for a missing part, and if
    the size or md5 is wrong."""
    sizes = _parts(store, upload.id)
    names = [f"{upload.id}.{part_id}" for part_id in asked.part_ids]
    if missing := [part_id for part_id, name in zip(asked.part_ids, names, strict=True) if name not in sizes]:
        raise _wrong("part_ids", f"the upload has no part {missing[0]!a}", "unknown_part")
    total = sum(sizes[name] for name in names)
    if total != upload.bytes:
        raise _wrong("part_ids", f"the parts hold {total} bytes, {upload.bytes} were announced", "wrong_size")
    new = store.new()
    try:
        for name in names:
            for block in store.objects.read(name):
                new.write(block)
        new.close()
    except BaseException:
        new.abandon()
        raise
    if asked.md5 is not None and new.md5.hexdigest() != asked.md5.lower():
        new.abandon()
        raise _wrong(
            "md5", f"the bytes that arrived have the md5 {new.md5.hexdigest()}: upload the parts again", "wrong_md5"
        )
    return new


async def _read(store: FileStore, upload_id: str) -> _Upload:
    known = upload_id.startswith("upload_") and upload_id.removeprefix("upload_").isalnum()
    content = await asyncio.to_thread(store.objects.get, f"{upload_id}.json") if known else None
    if content is None:
        message = f"there is no upload {upload_id!a}: POST /v1/uploads begins one"
        raise RequestRefused(Answer(404, "not_found_error", "unknown_upload", message, "upload_id"))
    upload = _RECORD.validate_json(content)
    if upload.shown.status != "pending":
        return upload
    if (file := await asyncio.to_thread(store.find, _file_id(upload_id))) is not None:
        return _completed(upload, file)  # a crash came before the record was updated
    if upload.shown.expires_at <= time.time():
        return upload.model_copy(update={"shown": upload.shown.model_copy(update={"status": "expired"})})
    return upload


def _file_id(upload_id: str) -> str:
    return f"file-{upload_id.removeprefix('upload_')}"


def _completed(upload: _Upload, file: File) -> _Upload:
    done = upload.shown.model_copy(update={"status": "completed", "file": shown(file)})
    return upload.model_copy(update={"shown": done})


async def _write(store: FileStore, upload: _Upload) -> None:
    await asyncio.to_thread(store.objects.put, f"{upload.shown.id}.json", _RECORD.dump_json(upload))


def _parts(store: FileStore, upload_id: str) -> dict[str, int]:
    """Size of each part by its name, also of parts that are still being received."""
    return {name: size for name, size in store.objects.sizes().items() if name.startswith(f"{upload_id}.part_")}


def _drop_parts(store: FileStore, upload_id: str) -> None:
    for name in _parts(store, upload_id):
        store.objects.delete(name)


def _require_pending(upload: OpenAIUpload) -> None:
    if upload.status != "pending":
        message = f"this upload is {upload.status}: POST /v1/uploads begins another"
        raise RequestRefused(Answer(409, "conflict_error", f"upload_{upload.status}", message, "upload_id"))


def _wrong(param: str, message: str, code: str) -> RequestRefused:
    problem = Problem(param, message, code)
    return RequestRefused(Answer(400, "invalid_request_error", code, f"{param}: {message}", param, [problem]))

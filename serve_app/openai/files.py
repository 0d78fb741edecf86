"""/v1/files: uploaded files, and the result files of jobs that are over."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from starlette.concurrency import iterate_in_threadpool

from events.decide import Refused
from events.ids import ulid_time
from events.job import FineTuningJob
from serve_app.backend import JobLog
from serve_app.download import attachment, download
from serve_app.errors import Answer, RequestRefused
from serve_app.openai import results
from serve_app.openai.multipart import Form, Limit, declared_bytes, receive
from serve_app.openai.objects import OpenAIExpiresAfter, OpenAIFile, OpenAIFileDeleted, OpenAIFileForm, OpenAIFileList
from serve_app.openai.paging import Cursor, page, unknown_after
from serve_app.openapi import documented, documented_bytes, form_body
from serve_app.routes import TheBackend
from trainers.errors import ConfigProblems, Problem, UserError
from trainers.files import PURPOSE, RESULTS_PURPOSE, File, FileStore, NewObject, check_jsonl, file_store
from trainers.planning.preflight import problems_of
from trainers.settings import Settings

router = APIRouter(prefix="/v1", default_response_class=Response)
OCTETS = "application/octet-stream"
PAGE_S = 10.0
"""Longest time for a page of files, in seconds. The size of a result file that was never listed takes long: its job's
whole history is read."""
FileId = Annotated[str, Path(min_length=1, max_length=256, description="The file's id.")]
After = Annotated[Cursor, Query(description="Only entries after this one: the last id of the previous page.")]


@router.post(
    "/files",
    summary="Upload a file",
    openapi_extra=form_body(OpenAIFileForm),
    responses=documented(OpenAIFile, "The file is on disk.", 400, 413, 415, 429),
)
async def create(request: Request, backend: TheBackend) -> Response:
    """Upload a JSONL file, as multipart/form-data.

    It may have TUNEWRIGHT_MAX_FILE_BYTES (512 MiB); upload a larger one in parts, through /v1/uploads. Only the first
    row is checked now; the job that uses the file validates all of them.
    """
    store = await store_of(backend.settings)
    await asyncio.to_thread(store.sweep, await in_use(backend.log))
    await room_for(store, backend.settings, min(declared_bytes(request), backend.settings.max_file_bytes))
    new = await asyncio.to_thread(store.new)
    limit = Limit(backend.settings.max_file_bytes, "upload larger files in parts, through /v1/uploads")
    form = await receive(request, "file", new, limit)
    try:
        expiry = _expiry(form)
        await room_for(store, backend.settings, 0)  # other requests may have written meanwhile
    except BaseException:
        await asyncio.shield(asyncio.to_thread(new.abandon))
        raise
    file = await keep(store, new, form.filename, expiry)
    return JSONResponse(shown(file).model_dump(mode="json"))


@router.get(
    "/files",
    summary="List files",
    responses=documented(OpenAIFileList, "The files.", 400, 404),
)
async def list_files(
    backend: TheBackend,
    purpose: Annotated[
        Annotated[str, Field(max_length=64)] | SkipJsonSchema[None], Query(description="Only files with this purpose.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="How many.")] = 10_000,
    after: After = None,
    order: Annotated[
        Literal["asc", "desc"],
        Query(
            description="By time of creation (of an upload in parts, its beginning): `asc` is oldest first, `desc` "
            "newest first."
        ),
    ] = "desc",
) -> Response:
    """Uploaded files, and the result files of jobs. A page that takes too long ends early, with `has_more`."""
    found: list[File | FineTuningJob] = []
    if purpose in (None, PURPOSE):
        found += await asyncio.to_thread((await store_of(backend.settings)).files)
    if purpose in (None, RESULTS_PURPOSE):
        found += [job for job in await all_jobs(backend.log) if results.has_results(job)]
    found.sort(key=_order, reverse=order == "desc")
    if after is not None:
        place = await _place_of(after, backend.log)
        found = [item for item in found if (_order(item) > place if order == "asc" else _order(item) < place)]
    files: list[OpenAIFile] = []
    seen = 0
    sizes = await asyncio.to_thread(results.sizes_in, backend.settings.storage)
    deadline = time.monotonic() + PAGE_S
    for item in found:
        if len(files) == limit or (files and time.monotonic() > deadline):
            break
        seen += 1
        try:
            files.append(shown(item) if isinstance(item, File) else await results.result_file(backend.log, item, sizes))
        except Refused as refused:
            if refused.code != "job_damaged":  # found to be damaged only now; `all_jobs` leaves out such jobs
                raise
    return JSONResponse(page(files, len(found) > seen))


@router.get("/files/{file_id}", summary="Retrieve a file", responses=documented(OpenAIFile, "The file.", 400, 404))
async def retrieve(backend: TheBackend, file_id: FileId) -> Response:
    """A file's name, size, purpose and dates."""
    if (job := await results.job_of(backend.log, file_id)) is not None:
        sizes = await asyncio.to_thread(results.sizes_in, backend.settings.storage)
        return JSONResponse((await results.result_file(backend.log, job, sizes)).model_dump(mode="json"))
    file = await asyncio.to_thread((await store_of(backend.settings)).get, file_id)
    return JSONResponse(shown(file).model_dump(mode="json"))


@router.delete(
    "/files/{file_id}",
    summary="Delete a file",
    responses=documented(OpenAIFileDeleted, "The file was deleted.", 400, 404, 409),
)
async def delete(backend: TheBackend, file_id: FileId) -> Response:
    """Delete a file. A file that an unfinished job uses can't be deleted, nor can a result file."""
    if await results.job_of(backend.log, file_id) is not None:
        raise _conflict("is the result of a job, and can't be deleted", "result_file")
    store = await store_of(backend.settings)
    file = await asyncio.to_thread(store.get, file_id)
    if file_id in await in_use(backend.log):
        raise _conflict("is used by an unfinished job: cancel the job first, or wait until it is over", "file_in_use")
    await asyncio.to_thread(store.delete, file)
    return JSONResponse(OpenAIFileDeleted(id=file_id).model_dump(mode="json"))


@router.get(
    "/files/{file_id}/content",
    summary="Download a file",
    responses=documented_bytes("The file's bytes.", 400, 404),
)
async def content(request: Request, backend: TheBackend, file_id: FileId) -> Response:
    """The bytes of a file as they were uploaded; a result file is CSV. The download of an uploaded file that broke off
    resumes with `Range`, as `curl -C -` does it."""
    if (job := await results.job_of(backend.log, file_id)) is not None:
        headers = {"Content-Disposition": attachment(results.FILENAME)}
        return Response(await results.result_csv(backend.log, job), headers=headers, media_type=OCTETS)
    store = await store_of(backend.settings)
    file = await asyncio.to_thread(store.get, file_id)

    async def read(start: int) -> AsyncGenerator[bytes, None]:
        async for block in iterate_in_threadpool(store.read(file, start)):
            yield block

    return download(request, read, size=file.bytes, etag=file.content, media_type=OCTETS, filename=file.filename)


async def store_of(settings: Settings) -> FileStore:
    return await asyncio.to_thread(file_store, settings.files_url)


async def room_for(store: FileStore, settings: Settings, size: int) -> None:
    """Raises RequestRefused (429) if the quota doesn't leave `size` bytes, or is exceeded."""
    if await asyncio.to_thread(store.used_bytes) + size > settings.files_quota_bytes:
        message = f"all files together may hold {settings.files_quota_bytes} bytes: delete some first"
        raise RequestRefused(Answer(429, "rate_limit_error", "quota_exceeded", message))


async def keep(
    store: FileStore, new: NewObject, filename: str, expiry: OpenAIExpiresAfter | None, file_id: str | None = None
) -> File:
    """Makes a file of received bytes, if they can be JSONL. If it raises, the bytes are abandoned unless they became a
    file."""

    def check_and_keep() -> File:
        try:
            check_jsonl(bytes(new.head))
        except UserError:
            new.abandon()
            raise
        return store.keep(new, filename, expiry.seconds if expiry else None, file_id)

    return await asyncio.shield(asyncio.to_thread(check_and_keep))  # runs even if the request is cancelled


async def in_use(log: JobLog) -> set[str]:
    """The data of unfinished jobs, as their configs name it: ids of files, and URIs."""
    live = await log.live_jobs()
    return {str(job.input_config.get(name)) for job in live.jobs for name in ("data", "validation_data")}


async def all_jobs(log: JobLog) -> list[FineTuningJob]:
    jobs, more = await log.jobs(1000, None)
    while more:
        older, more = await log.jobs(1000, jobs[-1].job_id)
        jobs += older
    return jobs


def shown(file: File) -> OpenAIFile:
    return OpenAIFile(**file.model_dump(exclude={"content"}))


def _order(item: File | FineTuningJob) -> tuple[int, str]:
    """The key that files are sorted by: time and id. The time of a file is that in its id, so that a page can go on
    after a deleted file. For an upload in parts it is when the upload began."""
    if isinstance(item, FineTuningJob):
        return results.created_at(item), results.file_id(item.job_id)
    made = ulid_time(item.id, "file-")
    return item.created_at if made is None else int(made), item.id


async def _place_of(after: str, log: JobLog) -> tuple[int, str]:
    """The sort key of the file `after`, which may have been deleted. Raises RequestRefused if it can't be the id of a
    file."""
    if (made := ulid_time(after, "file-")) is not None:
        return int(made), after
    if (job := await results.job_of(log, after)) is not None:
        return _order(job)
    raise unknown_after(after, "file")


def _expiry(form: Form) -> OpenAIExpiresAfter | None:
    """The form's `expires_after`, if there is one. Raises ConfigProblems if any field besides the file is wrong."""
    fields = dict(form.fields)
    problems = [] if fields.pop("purpose", None) == PURPOSE else [Problem("purpose", f"must be {PURPOSE!r}")]
    expiry = {name: fields.pop(f"expires_after[{name}]", None) for name in ("anchor", "seconds")}
    problems += [Problem(ascii(name[:100])[1:-1], "unknown field", "unknown_field") for name in fields]
    if problems:
        raise ConfigProblems(problems)
    if not any(expiry.values()):
        return None
    seconds: Any = expiry["seconds"]
    if isinstance(seconds, str) and seconds.isascii() and seconds.isdigit() and len(seconds) < 12:
        seconds = int(seconds)
    try:
        return OpenAIExpiresAfter(anchor=expiry["anchor"], seconds=seconds)  # type: ignore[arg-type]  # it checks them
    except ValidationError as error:
        raise ConfigProblems(prefixed("expires_after", problems_of(error.errors(include_input=False)))) from None


def prefixed(prefix: str, problems: Iterable[Problem]) -> list[Problem]:
    return [problem._replace(param=f"{prefix}.{problem.param}") for problem in problems]


def _conflict(message: str, code: str) -> RequestRefused:
    return RequestRefused(Answer(409, "conflict_error", code, f"this file {message}", "file_id"))

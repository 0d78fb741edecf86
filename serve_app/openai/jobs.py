"""/v1/fine_tuning/jobs: the jobs of the log in OpenAI's format, and OpenAI's requests to create and control them."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from events.facts import CancelRequested, JobResumed, PauseRequested
from events.ids import new_event_id
from events.job import FineTuningJob
from events.jobs import same_request
from serve_app.openai import mapping, timeline
from serve_app.openai.objects import OpenAICheckpointList, OpenAIEventList, OpenAIJob, OpenAIJobList, OpenAIJobRequest
from serve_app.openai.paging import After, Limit, page, unknown_after
from serve_app.openai.tuned import saved_as, saved_at, with_directory
from serve_app.openapi import documented, json_body
from serve_app.routes import IdempotencyKey, TheBackend, begun, examined, made_before, received
from trainers.errors import ConfigProblems

router = APIRouter(prefix="/v1", default_response_class=Response)
JOBS = "/fine_tuning/jobs"
JobId = Annotated[str, Path(min_length=1, max_length=128, description="The job's id.")]


@router.post(
    JOBS,
    summary="Create a fine-tuning job",
    openapi_extra=json_body(OpenAIJobRequest),
    responses=documented(OpenAIJob, "The job was created.", 400, 404, 409, 413, 415, 429),
)
async def create(request: Request, backend: TheBackend, idempotency_key: IdempotencyKey = None) -> Response:
    """Create a job from an uploaded file. It trains a LoRA adapter; docs/openai.md says what each field means here."""
    asked = await received(OpenAIJobRequest, request, backend)
    config = mapping.config_of(asked)
    openai = asked.model_dump(mode="json", exclude_none=True)

    def same(job: FineTuningJob) -> bool:
        """Whether this request made `job`. The model is compared by the name that was sent, which is in `openai`: the
        checkpoint that the name stood for may be gone by now."""
        return same_request(job, config | {"model": job.input_config.get("model")}, openai)

    if made := await made_before(backend, idempotency_key, same):
        return _answer(made)
    config, origin = await with_directory(backend.log, config)
    submitted, problems = await examined(backend, config)
    if submitted is None or problems:
        raise ConfigProblems([mapping.in_openai_words(problem) for problem in problems])
    update = {"openai": openai, "idempotency_key": idempotency_key, "resubmitted_from": origin}
    return await begun(request, backend, submitted.model_copy(update=update), _shown)


@router.get(JOBS, summary="List fine-tuning jobs", responses=documented(OpenAIJobList, "The jobs.", 400, 404))
async def list_jobs(request: Request, backend: TheBackend, limit: Limit = 20, after: After = None) -> Response:
    """Jobs, newest first. `metadata[key]=value` lists only those that have it, `metadata=null` those without any."""
    wanted = _wanted(request.query_params)
    found: list[FineTuningJob] = []
    more = True
    while more and len(found) <= limit:
        jobs, more = await backend.log.jobs(100, after)
        found += [job for job in jobs if wanted is None or _has(job, wanted)]
        after = jobs[-1].job_id if jobs else after
    return JSONResponse(page([mapping.shown(job) for job in found[:limit]], len(found) > limit))


@router.get(f"{JOBS}/{{job_id}}", summary="Retrieve a job", responses=documented(OpenAIJob, "The job.", 400, 404))
async def retrieve(backend: TheBackend, job_id: JobId) -> Response:
    """The job, whichever API it was submitted through."""
    return _answer(await backend.log.job(job_id))


@router.post(
    f"{JOBS}/{{job_id}}/cancel",
    summary="Cancel a job",
    responses=documented(OpenAIJob, "The job is being cancelled.", 400, 404, 409),
)
async def cancel(backend: TheBackend, job_id: JobId) -> Response:
    """Answers as soon as the request is on disk; the job reads `cancelled` within seconds."""
    return _answer(await backend.log.append(job_id, [CancelRequested()], [f"{job_id}:cancel"]))


@router.post(
    f"{JOBS}/{{job_id}}/pause",
    summary="Pause a job",
    responses=documented(OpenAIJob, "The job will stop at a checkpoint, or is paused already.", 400, 404, 409),
)
async def pause(backend: TheBackend, job_id: JobId) -> Response:
    """Answers as soon as the request is on disk. The job reads `paused` once it has stopped at a checkpoint."""
    return _answer(await backend.log.append(job_id, [PauseRequested()], [new_event_id()]))


@router.post(
    f"{JOBS}/{{job_id}}/resume",
    summary="Resume a paused job",
    responses=documented(OpenAIJob, "The job goes on, when it is its turn.", 400, 404, 409),
)
async def resume(backend: TheBackend, job_id: JobId) -> Response:
    """Put it back in line; it goes on from the checkpoint that it paused at."""
    return _answer(await backend.log.append(job_id, [JobResumed()], [new_event_id()]))


@router.get(
    f"{JOBS}/{{job_id}}/events",
    summary="List a job's events",
    responses=documented(OpenAIEventList, "The events.", 400, 404),
)
async def list_events(backend: TheBackend, job_id: JobId, limit: Limit = 20, after: After = None) -> Response:
    """What happened to the job, newest first. Events of type `metrics` carry those of a step or an evaluation."""
    job = await backend.log.job(job_id)
    events, more = await timeline.events_before(backend.log, job, after, limit)
    return JSONResponse(page(events, more))


@router.get(
    f"{JOBS}/{{job_id}}/checkpoints",
    summary="List a job's checkpoints",
    responses=documented(OpenAICheckpointList, "The checkpoints.", 400, 404),
)
async def list_checkpoints(
    backend: TheBackend,
    job_id: JobId,
    limit: Annotated[int, Query(ge=1, le=100, description="How many.")] = 10,
    after: After = None,
) -> Response:
    """The checkpoints that are on disk, newest first."""
    job = await backend.log.job(job_id)
    newest = sorted(job.checkpoint_versions.values(), reverse=True)
    if after is not None:  # that checkpoint may have been deleted since
        end = await saved_as(backend.log, job_id, after)
        if end is None:
            raise unknown_after(after, "checkpoint")
        newest = [version for version in newest if version < end[0].version]
    saved = [await saved_at(backend.log, job_id, version) for version in newest[:limit]]
    checkpoints = [mapping.checkpoint(job, *one) for one in saved if one is not None]
    return JSONResponse(page(checkpoints, len(newest) > limit))


def _answer(job: FineTuningJob) -> Response:
    return JSONResponse(_shown(job))


def _shown(job: FineTuningJob) -> dict[str, Any]:
    return mapping.shown(job).model_dump(mode="json")


def _wanted(query: Mapping[str, str]) -> dict[str, str] | None:
    """The metadata that a query filters by: None for no filter, empty for jobs without metadata."""
    if query.get("metadata") == "null":
        return {}
    named = {name[9:-1]: value for name, value in query.items() if name.startswith("metadata[") and name.endswith("]")}
    return named or None


def _has(job: FineTuningJob, wanted: dict[str, str]) -> bool:
    metadata = mapping.metadata_of(job)
    return all(metadata.get(key) == value for key, value in wanted.items()) if wanted else not metadata

"""The routes of our own API, /fine_tuning and /healthz. They read the request, call the event log, and answer."""

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema

from events.config import Config
from events.facts import CancelRequested, JobResumed, JobSubmitted, PauseRequested, Resources
from events.ids import new_event_id, new_job_id
from events.job import FineTuningJob
from events.jobs import key_reused, same_request
from events.log import LogUnavailable
from serve_app.backend import Backend
from serve_app.body import read_object
from serve_app.delivery import Deliveries, digest_of, says_it_is_a_retry
from serve_app.openai.tuned import with_directory
from serve_app.openapi import documented, documented_stream, json_body
from serve_app.pace import time_of
from serve_app.streaming import Stream
from serve_app.tail import tail
from serve_app.wire import (
    CancelRequest,
    FineTuningJobList,
    Health,
    PauseRequest,
    ResubmitRequest,
    ResumeRequest,
    TailLine,
)
from trainers.errors import ConfigProblems, Problem
from trainers.estimate import Estimate
from trainers.planning.preflight import Examined, examine, problems_of, without_nulls
from trainers.resubmit import is_repeated, problem_of_resubmission, resubmission

router = APIRouter(default_response_class=Response)  # the routes document their own types and schemas
Body = TypeVar("Body", bound=BaseModel)
JOBS = "/fine_tuning/jobs"
HEALTH_S = 5.0  # A log that takes longer to answer counts as unreachable.


async def _backend(request: Request) -> Backend:
    """Async, though it awaits nothing: FastAPI would call a plain function in a thread, which takes longer."""
    backend: Backend = request.app.state.backend
    return backend


TheBackend = Annotated[Backend, Depends(_backend)]
JobId = Annotated[str, Query(min_length=1, max_length=128)]
After = Annotated[
    Annotated[str, Field(min_length=1, max_length=128)] | SkipJsonSchema[None],
    Query(description="Only jobs older than this one: the last id of the previous page."),
]
Key = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[ -~]+$")] | SkipJsonSchema[None]


def idempotency_header(retried: str) -> Any:  # noqa: ANN401  -- Header() of any type
    """The parameter for the Idempotency-Key header; `retried` says what a retry does."""
    description = f"Any printable ASCII text of yours. A retry with the same key and the same body {retried}"
    return Header(alias="Idempotency-Key", description=description)


IdempotencyKey = Annotated[
    Key,
    idempotency_header(
        "returns the job that the first request made. Without a key, an identical request within 60 s does so, too, if "
        "the first answer was not delivered or if `x-stainless-retry-count` says that it is a retry."
    ),
]


@router.post(
    f"{JOBS}/submit",
    summary="Submit a fine tuning job",
    openapi_extra=json_body(Config),
    responses=documented(FineTuningJob, "Successfully submitted the fine tuning job.", 404, 409, 413, 415, 422, 429),
)
async def submit(request: Request, backend: TheBackend, idempotency_key: IdempotencyKey = None) -> Response:
    """Submit a fine tuning job with the specified configuration.

    Answers as soon as the job is on disk, with status `validation`. Whatever can be found wrong with the request is
    reported now, all of it at once; the job itself validates the rows of the data. `model` may also name a tuned model
    or a checkpoint, as in POST /v1/fine_tuning/jobs: the job then starts from its weights (`resubmitted_from`).
    """
    document = await read_object(request, backend.settings.max_body_bytes)
    config = without_nulls(document)

    def same(job: FineTuningJob) -> bool:
        """A tuned model is compared by its name: its directory may be gone by now."""
        origin = job.resubmitted_from
        if origin is None or origin.model is None:
            return same_request(job, config, None)
        directory = job.input_config["model"]
        return config.get("model") == origin.model and same_request(job, config | {"model": directory}, None)

    if made := await made_before(backend, idempotency_key, same):
        return JSONResponse(made.wire())
    document, origin = await with_directory(backend.log, document)
    submitted, problems = await examined(backend, document)
    if submitted is None or problems:
        raise ConfigProblems(problems)
    if origin is not None:
        origin = origin.model_copy(update={"model": config["model"]})
    update = {"idempotency_key": idempotency_key, "resubmitted_from": origin}
    return await begun(request, backend, submitted.model_copy(update=update))


@router.post(
    f"{JOBS}/estimate",
    summary="Estimate what a job would take",
    openapi_extra=json_body(Config),
    responses=documented(Estimate, "What the job would take.", 404, 409, 413, 415, 422, 429),
)
async def estimate(request: Request, backend: TheBackend) -> Response:
    """Say what a job with this configuration would take. No job is created, and nothing is recorded.

    The rows of the data are read and tokenised as in the job's own validation (of a large file, only a sample of them:
    `sampled`), and what is wrong with them is reported by line number. That takes seconds, a minute at most. A model
    that isn't here yet is examined without downloading its weights. `model` may also name a tuned model or a
    checkpoint, as in POST /v1/fine_tuning/jobs.
    """
    document, _ = await with_directory(backend.log, await read_object(request, backend.settings.max_body_bytes))
    planned, resources = await _planned(backend, document)
    if planned.plan is None or resources is None or planned.problems:
        raise ConfigProblems(planned.problems)
    found = await backend.estimate(planned.plan, resources)
    time = await time_of(planned.plan, resources, found, backend.log)
    return JSONResponse(found.estimate(resources, time).model_dump(mode="json", exclude_none=True))


@router.get(
    f"{JOBS}/status",
    summary="Retrieve the status of a job",
    responses=documented(FineTuningJob, "Successfully retrieved the job status.", 404, 422),
)
async def status(
    backend: TheBackend, job_id: Annotated[JobId, Query(description="The ID of the job to retrieve status for.")]
) -> Response:
    """Retrieve the status of one fine tuning job. `GET /fine_tuning/jobs` gives the last N."""
    body = await backend.log.job_json(job_id)
    why = (await backend.whys()).get(job_id)
    if why is not None:
        body = json.dumps(_with_why(json.loads(body), why)).encode()
    return Response(body, media_type="application/json")


@router.post(
    f"{JOBS}/cancel",
    summary="Cancel provided job",
    openapi_extra=json_body(CancelRequest),
    responses=documented(FineTuningJob, "Successfully cancelled the fine tuning job.", 404, 409, 413, 415, 422),
)
async def cancel(request: Request, backend: TheBackend) -> Response:
    """Cancel the fine tuning job with the specified job ID.

    Answers as soon as the request is on disk. Within seconds the job reads `cancelled`: its workers are gone then, and
    what they held is free. Cancelling a cancelled job returns it.
    """
    asked = await received(CancelRequest, request, backend)
    job = await backend.log.append(asked.job_id, [CancelRequested()], [f"{asked.job_id}:cancel"])
    return JSONResponse(job.wire())


@router.post(
    f"{JOBS}/pause",
    summary="Pause a job",
    openapi_extra=json_body(PauseRequest),
    responses=documented(
        FineTuningJob, "The job will stop at a checkpoint, or is paused already.", 404, 409, 413, 415, 422
    ),
)
async def pause(request: Request, backend: TheBackend) -> Response:
    """Stop the job at a checkpoint until it is resumed.

    Answers as soon as the request is on disk. A running job finishes its current step, writes a checkpoint and frees
    what it holds; it then reads `queued`, with the pause as its `why`. Pausing a paused job returns it. A pause doesn't
    count as an interruption (--max-restarts).
    """
    asked = await received(PauseRequest, request, backend)
    job = await backend.log.append(asked.job_id, [PauseRequested()], [new_event_id()])
    return JSONResponse(job.wire())


@router.post(
    f"{JOBS}/resume",
    summary="Resume a paused job",
    openapi_extra=json_body(ResumeRequest),
    responses=documented(FineTuningJob, "The job goes on, when it is its turn.", 404, 409, 413, 415, 422),
)
async def resume(request: Request, backend: TheBackend) -> Response:
    """Put a paused job back in line, in the order in which jobs were submitted.

    It goes on from the checkpoint it paused at, and its losses are those of a job that was never paused. Resuming a
    job that isn't paused returns it.
    """
    asked = await received(ResumeRequest, request, backend)
    job = await backend.log.append(asked.job_id, [JobResumed()], [new_event_id()])
    return JSONResponse(job.wire())


@router.post(
    f"{JOBS}/resubmit",
    summary="Submit a job again from one of its checkpoints",
    openapi_extra=json_body(ResubmitRequest),
    responses=documented(FineTuningJob, "The new job.", 404, 413, 415, 422, 429),
)
async def resubmit(request: Request, backend: TheBackend, idempotency_key: IdempotencyKey = None) -> Response:
    """Start a new job from a checkpoint of an earlier one, with changed options.

    The new job has the earlier one's config with the changes in `config`, and the checkpoint as its model (for an
    adapter, the merged model). It takes over the weights only: optimizer, learning rate schedule and data start anew.
    It is checked like any submit, and `resubmitted_from` says where it came from.
    """
    document = await read_object(request, backend.settings.max_body_bytes)
    asked = parsed(ResubmitRequest, {key: value for key, value in document.items() if value is not None})
    earlier = await backend.log.job(asked.job_id)
    if made := await made_before(
        backend, idempotency_key, lambda job: is_repeated(job, earlier, asked.checkpoint, asked.config)
    ):
        return JSONResponse(made.wire())
    again = await asyncio.to_thread(resubmission, earlier, asked.checkpoint, asked.config)
    submitted, problems = await examined(backend, again.document)
    if again.origin is None:  # the document has the earlier job's model then, which is not what was asked for
        problems = [problem for problem in problems if problem.param != "model"]
    problems = [*again.problems, *map(problem_of_resubmission, problems)]
    if submitted is None or problems:
        raise ConfigProblems(problems)
    origin = {"resubmitted_from": again.origin, "idempotency_key": idempotency_key}
    return await begun(request, backend, submitted.model_copy(update=origin))


@router.get(
    f"{JOBS}/tail",
    summary="Tail logs of a particular job",
    responses=documented_stream(TailLine, "Streaming logs in real-time.", 404, 422),
)
async def tail_logs(
    request: Request,
    backend: TheBackend,
    job_id: Annotated[JobId, Query(description="The ID of the job to tail logs for.")],
    after: Annotated[
        int, Query(ge=0, lt=2**53, description="Offset to start at: 0, or the `next` of the last line you received.")
    ] = 0,
    follow: Annotated[
        bool,
        Query(
            description="`true`: wait for new lines until the job ends. `false`: return only the lines there are now."
        ),
    ] = True,
) -> Response:
    """Stream the logs of a particular job in real-time. This endpoint supports streaming responses.

    Works before the job starts and after it has ended. An idle stream gets an empty line (`"logs": []`) at least every
    TUNEWRIGHT_HEARTBEAT_S seconds (15). The last line of a job that has ended carries `status`. If a stream
    ends without one, the service is being restarted: reconnect with `after` = the last `next`.
    """
    job = await backend.log.job(job_id)
    state, heartbeat_s = request.app.state, backend.settings.heartbeat_s
    lines = tail(
        backend, job, state.together, after=after, follow=follow, heartbeat_s=heartbeat_s, closing=state.closing
    )
    return Stream(lines, "application/x-ndjson")


@router.get(
    JOBS,
    summary="List the last N fine tuning jobs",
    responses=documented(FineTuningJobList, "The jobs, newest first.", 404, 422),
)
async def list_jobs(
    backend: TheBackend,
    limit: Annotated[int, Query(ge=1, le=100, description="How many.")] = 20,
    after: After = None,
) -> Response:
    """The last `limit` jobs, newest first; with `after`, the ones before that job."""
    jobs, has_more = await backend.log.jobs(limit, after)
    whys = await backend.whys()
    data = [_with_why(job.wire(), whys.get(job.job_id)) for job in jobs]
    return JSONResponse({"object": "list", "data": data, "has_more": has_more})


@router.get(
    "/healthz",
    summary="Check that the service works",
    responses=documented(Health, "The event log answers."),
)
async def healthz(backend: TheBackend) -> Response:
    """Asks the event log for one job: 200 when it answers, 503 when it doesn't."""
    try:
        async with asyncio.timeout(HEALTH_S):
            await backend.log.jobs(1, None)
    except TimeoutError:
        raise LogUnavailable("no answer in time") from None
    return JSONResponse(Health().model_dump())


@router.get("/", include_in_schema=False)
async def root(request: Request) -> Response:
    return RedirectResponse(request.app.url_path_for("docs"))


async def made_before(
    backend: Backend, idempotency_key: str | None, same: Callable[[FineTuningJob], bool]
) -> FineTuningJob | None:
    """The job that an earlier try of the request with the same key made. Call this before the request is examined: its
    data may be gone by now.

    Raises Refused `idempotency_key_reused` if the job isn't the `same` as the request asks for.
    """
    job = None if idempotency_key is None else await backend.log.job_with_key(idempotency_key)
    if job is not None and not same(job):
        raise key_reused(job)
    return job


async def examined(backend: Backend, document: dict[str, Any]) -> tuple[JobSubmitted | None, list[Problem]]:
    """The event that begins the job, still without an id, and everything that is wrong with the request."""
    found, resources = await _planned(backend, document)
    if found.plan is None or resources is None:
        return None, found.problems
    submitted = JobSubmitted(
        config=found.document,
        resources=resources,
        defaults=found.plan.defaults,
        max_restarts=found.plan.max_restarts,
        submission_id="",
    )
    return submitted, found.problems


async def _planned(backend: Backend, document: dict[str, Any]) -> tuple[Examined, Resources | None]:
    """The plan that a request means, with everything that is wrong with it, and the resources of its job."""
    found = await asyncio.to_thread(examine, document, backend.settings)
    if found.plan is None:
        return found, None
    try:
        return found, await backend.resources(found.plan, found.architecture)
    except ConfigProblems as infeasible:
        return found._replace(problems=[*found.problems, *infeasible.problems]), None


async def begun(
    request: Request,
    backend: Backend,
    submitted: JobSubmitted,
    show: Callable[[FineTuningJob], dict[str, Any]] = FineTuningJob.wire,
) -> Response:
    """Submits a job and answers with it; if this request is a retry, with the job that the first try made."""
    deliveries: Deliveries = request.app.state.deliveries
    digest = digest_of(request, {"config": submitted.config, "openai": submitted.openai})
    job_id = new_job_id()
    update: dict[str, Any] = {"submission_id": job_id}
    if submitted.idempotency_key is None:
        update["request_digest"] = digest
        await deliveries.settled(digest)
    job = await backend.log.submit(
        job_id,
        submitted.model_copy(update=update),
        f"{job_id}:submitted",
        backend.settings.max_live_jobs,
        retried=says_it_is_a_retry(request),
    )
    return deliveries.answer(show(job), digest, lambda: backend.log.answered(job.job_id))


async def received(model: type[Body], request: Request, backend: Backend) -> Body:
    """The body of a request. Raises ConfigProblems."""
    return parsed(model, await read_object(request, backend.settings.max_body_bytes))


def parsed(model: type[Body], document: dict[str, Any]) -> Body:
    """Validates a body that has been read. Raises ConfigProblems."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise ConfigProblems(problems_of(error.errors(include_input=False), model)) from None


def _with_why(document: dict[str, Any], why: str | None) -> dict[str, Any]:
    """The job with the reason why it waits, which only the dispatcher knows.

    The dispatcher's view is a moment old: if the log says that the job no longer waits, the log is right.
    """
    if why is None or document["status"] not in ("validation", "queued") or document["cancel_requested"]:
        return document
    known = document.get("why")
    return document | {"why": f"{known}; {why}" if known else why}

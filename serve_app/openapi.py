"""The OpenAPI document: everything that `fine_tuning_api.yaml` names, and the additions of this service.

FastAPI derives most of it from the routes. The schemas of request bodies and jobs are named here, because
`serve_app.body` reads the bodies, and jobs are sent as the log encoded them.
"""

from collections.abc import Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from events.config import Config
from events.job import FineTuningJob
from serve_app.openai import chat_objects, objects
from serve_app.wire import (
    CancelRequest,
    ErrorEnvelope,
    FineTuningJobList,
    Health,
    PauseRequest,
    ResubmitRequest,
    ResumeRequest,
    TailLine,
)
from trainers.data.dialog import PreferenceDataItem, TrainingDataItem
from trainers.estimate import Estimate

TITLE = "Fine Tuning API"
DESCRIPTION = """API for managing fine tuning jobs for machine learning models.

Estimate what a job would take, submit it, read its status, tail its log, pause and resume it, cancel it, submit it
again from one of its checkpoints. Every error, of every route, has one form: `ErrorEnvelope`; its
`type` goes with the status code, and a 422 names everything that is wrong with the request. Every response carries an
`x-request-id`."""

Responses = dict[int | str, dict[str, Any]]

_MODELS = (
    *(CancelRequest, Config, ErrorEnvelope, Estimate, FineTuningJob, FineTuningJobList, Health, TailLine),
    *(PauseRequest, PreferenceDataItem, ResubmitRequest, ResumeRequest, TrainingDataItem),
    *(kind for module in (objects, chat_objects) for name, kind in vars(module).items() if name.startswith("OpenAI")),
)
_EXAMPLES: dict[str, dict[str, Any]] = {
    "Config": {
        "model": "smollm2-135m-instruct",
        "data": "examples/tickets/train.jsonl",
        "validation_data": "examples/tickets/valid.jsonl",
        "fine_tuning_options": {"n_epochs": 2, "custom_training_options": {"finetuning_type": "lora"}},
    },
    "CancelRequest": {"job_id": "ftjob-01..."},
    "PauseRequest": {"job_id": "ftjob-01..."},
    "ResumeRequest": {"job_id": "ftjob-01..."},
    "ResubmitRequest": {"job_id": "ftjob-01...", "checkpoint": 40, "config": {"fine_tuning_options": {"lr": 1e-5}}},
    # For a file, its name.
    "OpenAIFileForm": {"purpose": "fine-tune", "file": "examples/tickets/train.jsonl"},
    "OpenAIPartForm": {"data": "examples/tickets/train.jsonl"},
    "OpenAIUploadRequest": {
        "bytes": 89907,
        "filename": "train.jsonl",
        "mime_type": "application/jsonl",
        "purpose": "fine-tune",
    },
    "OpenAIUploadCompletion": {"part_ids": ["part_01..."]},
    "OpenAIJobRequest": {
        "model": "smollm2-135m-instruct",
        "training_file": "examples/tickets/train.jsonl",
        "suffix": "tickets",
    },
    "OpenAIChatRequest": {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Name three colours."}],
        "max_completion_tokens": 32,
    },
    "OpenAIWebhookRequest": {
        "name": "my service",
        "url": "https://example.com/hooks",
        "event_types": ["fine_tuning.job.succeeded"],
    },
    "OpenAIWebhookUpdate": {"url": "https://example.com/new"},
    "OpenAIWebhookRotation": {"keep_old_secret_active_for_24_hours": True},
    "OpenAIWebhookTest": {"event_type": "fine_tuning.job.succeeded"},
    "TrainingDataItem": {
        "dialog": [
            {"role": "system", "content": "Answer with a ticket."},
            {"role": "user", "content": "The helmet has not arrived yet. Order number 99948."},
            {"role": "assistant", "content": "delivery | order 99948 | normal"},
        ],
        "keep_loss": [False, False, True],
    },
}
_REF = "#/components/schemas/{model}"
_WHEN = {
    400: "`invalid_request_error`: the request is wrong; `errors` lists everything that is.",
    403: "`invalid_request_error`: a browser sent the request for a page of another site.",
    404: "`not_found_error`: there is no such job, file, upload, model, checkpoint or webhook endpoint.",
    409: "`conflict_error`: the job is over, or being cancelled; the file is in use; the upload is over; the job has "
    "no model yet; the endpoint is disabled.",
    413: "`invalid_request_error`: the JSON is larger than TUNEWRIGHT_MAX_BODY_BYTES (1 MiB), a file than "
    "TUNEWRIGHT_MAX_FILE_BYTES (512 MiB), a part than 64 MiB, or an upload than TUNEWRIGHT_MAX_UPLOAD_BYTES (8 GiB).",
    415: "`invalid_request_error`: the body is of another type than the route takes: `application/json` in UTF-8, or "
    "for files and parts `multipart/form-data`.",
    416: "`invalid_request_error`: the `Range` begins beyond the end.",
    421: "`invalid_request_error`: the request is for a host that TUNEWRIGHT_HOSTS doesn't name.",
    422: "`invalid_request_error`: the request is wrong; `errors` lists everything that is.",
    429: "`rate_limit_error`: there are TUNEWRIGHT_MAX_LIVE_JOBS (1000) unfinished jobs already, or too many questions "
    "or estimates. Without a Retry-After: the files hold TUNEWRIGHT_FILES_QUOTA_BYTES, there are fifty webhook "
    "endpoints, or one has ten old secrets.",
    500: "`server_error`: a bug; the operator can find it in the log under the request's id.",
    503: "`service_unavailable_error`: the event log, the storage of files or the process of a model can't be reached; "
    "try again. `job_damaged`: the job's history is damaged, and only the operator can help.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait before trying again.", "schema": {"type": "integer"}}}


def documented(model: type[BaseModel], description: str, *errors: int) -> Responses:
    """The `responses` of a route: `model` with 200, the envelope with `errors`, 500 and 503."""
    return {200: {"description": description, "content": _content("application/json", model)}} | _errors(errors)


def documented_stream(line: type[BaseModel], description: str, *errors: int) -> Responses:
    """The same for a route that streams `line`s."""
    headers = {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}
    stream = {
        "description": description,
        "content": _content("application/x-ndjson", line),
        "headers": {name: {"schema": {"type": "string", "default": value}} for name, value in headers.items()},
    }
    return {200: stream} | _errors(errors)


def documented_events(model: type[BaseModel], description: str, *errors: int) -> Responses:
    """The same for a route that answers with `model` or, if the request asks for them, with server-sent events."""
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}  # each of them
    content = _content("application/json", model) | {"text/event-stream": {"schema": event}}
    return {200: {"description": description, "content": content}} | _errors(errors)


def documented_bytes(description: str, *errors: int, media_type: str = "application/octet-stream") -> Responses:
    """The same for a route that answers with bytes."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    part = {"description": "What the header `Range` asks for, where it is one range of bytes.", "content": content}
    return {200: {"description": description, "content": content}, 206: part} | _errors((*errors, 416))


def form_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads `model` from a form with a file."""
    return {"requestBody": {"required": True, "content": _content("multipart/form-data", model)}}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads `model` from its body."""
    return {"requestBody": {"required": True, "content": _content("application/json", model)}}


def _errors(statuses: tuple[int, ...]) -> Responses:
    return {
        status: {
            "description": _WHEN[status],
            "content": _content("application/json", ErrorEnvelope),
            **({"headers": _RETRY_AFTER} if status in (429, 503) else {}),
        }
        for status in (*statuses, 500, 503)
    }


def _content(media_type: str, model: type[BaseModel]) -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": _REF.format(model=model.__name__)}}}


def describe(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The whole document."""
    document = get_openapi(title=TITLE, version="1.0.0", description=DESCRIPTION, routes=routes)
    # In validation mode a field with a default is not required; that holds in both directions here.
    _, definitions = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_REF)
    public = {name: schema for name, schema in sorted(definitions["$defs"].items()) if not name.startswith("_")}
    for name, example in _EXAMPLES.items():
        public[name]["examples"] = [example]
    document["components"] = {"schemas": public}
    _correct_statuses(document["paths"])
    return document


def _correct_statuses(paths: dict[str, dict[str, Any]]) -> None:
    """Corrects FastAPI's statuses: it adds a 422 to every route with parameters, where /v1 answers 400, and doesn't
    know the 403 and 421 of the middleware."""
    for path, methods in paths.items():
        for method, operation in methods.items():
            responses = operation["responses"]
            if path.startswith("/v1/"):
                responses.pop("422", None)
            of_middleware: tuple[int, ...] = (421,) if method == "get" else (403, 421)
            responses |= {str(status): _errors(of_middleware)[status] for status in of_middleware}
            operation["responses"] = dict(sorted(responses.items()))

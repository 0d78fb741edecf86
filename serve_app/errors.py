"""One table that maps exceptions to HTTP responses, all in one envelope.

    {"error": {"message", "type", "param", "code", "errors"?}}

    status  type                       when
    400     invalid_request_error      what is a 422 elsewhere, under /v1
    403     invalid_request_error      a browser sent it for a page of another site
    404     not_found_error            unknown job, file, model or checkpoint, unknown route
    405     invalid_request_error      the route exists, the method doesn't
    409     conflict_error             cancelling a job that has succeeded or failed; pausing or resuming one that is
                                       over or being cancelled; asking the model of a job that has not succeeded
    413     invalid_request_error      the body is larger than TUNEWRIGHT_MAX_BODY_BYTES, or a file than its own limit
    415     invalid_request_error      the body is not application/json, or of a file not multipart/form-data
    416     invalid_request_error      the range of a download begins beyond its end
    421     invalid_request_error      for a host that TUNEWRIGHT_HOSTS doesn't name
    422     invalid_request_error      anything wrong with the request; `errors` lists it, up to a hundred of a kind
    429     rate_limit_error           TUNEWRIGHT_MAX_LIVE_JOBS unfinished jobs, or too many questions to models or
                                       estimates:
                                       Retry-After says when to try again. Without it: TUNEWRIGHT_FILES_QUOTA_BYTES of
                                       files, fifty webhook endpoints, or ten old secrets of one
    500     server_error               a bug; the operator's log has the traceback under the request's id
    503     service_unavailable_error  the event log, the storage of files or the cluster can't be reached; nothing was
                                       recorded, or a retry with the same Idempotency-Key finds it; or the job's
                                       history is damaged (`job_damaged`): only its operator can help

Messages repeat nothing of the request but names: of fields, jobs, models, files and paths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from ray.exceptions import RayActorError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from events.decide import Refused
from events.log import LogUnavailable
from serve_app.wire import ErrorBody, ErrorEnvelope, ErrorType, ProblemDetail
from trainers.errors import LONGEST_NAME, ConfigProblems, InfrastructureError, Problem, UserError
from trainers.planning.preflight import problems_of
from trainers.webhooks.deliverer import WebhooksUnavailable

RETRY_AFTER_S = 5


@dataclass(frozen=True)
class Answer:
    """An error as the client gets it. OpenAI's client retries 409, 429 and 5xx unless X-Should-Retry says no, as it
    does here on every answer without Retry-After."""

    status: int
    type: ErrorType
    code: str
    message: str
    param: str | None = None
    problems: Sequence[Problem] = ()
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        details = [ProblemDetail(param=p.param, message=p.message, code=p.code) for p in self.problems] or None
        body = ErrorBody(message=self.message, type=self.type, param=self.param, code=self.code, errors=details)
        exclude = None if details else {"error": {"errors"}}
        return Response(
            ErrorEnvelope(error=body).model_dump_json(exclude=exclude),
            self.status,
            self.headers if "Retry-After" in self.headers else {**self.headers, "X-Should-Retry": "false"},
            media_type="application/json",
        )


class RequestRefused(Exception):
    """A request that the API itself refuses, with the answer to it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.message)
        self.answer = answer


def _problems(problems: Sequence[Problem]) -> Answer:
    problems = [p._replace(param=p.param and _shortened(p.param)) for p in problems]
    named = "; ".join(f"{p.param}: {p.message}" if p.param else p.message for p in problems)
    count = "" if len(problems) == 1 else f"{len(problems)} problems: "
    first = problems[0]
    return Answer(422, "invalid_request_error", first.code, count + named, first.param, problems)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def _config_problems(exc: ConfigProblems) -> Answer:
    return _problems(exc.problems)


def _parameters(exc: RequestValidationError) -> Answer:
    # The first element of `loc` says where the parameter is: query, path, header.
    return _problems(problems_of([{**error, "loc": error["loc"][1:]} for error in exc.errors()]))


_REFUSALS: dict[str, tuple[int, ErrorType, str | None]] = {
    "unknown_job": (404, "not_found_error", "job_id"),
    "unknown_after": (404, "not_found_error", "after"),
    "job_is_over": (409, "conflict_error", "job_id"),
    "cancelling": (409, "conflict_error", "job_id"),
    "too_many_jobs": (429, "rate_limit_error", None),
    "idempotency_key_reused": (422, "invalid_request_error", "Idempotency-Key"),
    "job_damaged": (503, "service_unavailable_error", "job_id"),
}


_NEXT = {
    "unknown_job": "GET /fine_tuning/jobs lists the jobs",
    "cancelling": "it can be neither paused nor resumed",
    "job_is_over": "POST /fine_tuning/jobs/resubmit starts a new one from one of its checkpoints",
}
"""What to do next, added to messages of the event log, which knows no routes."""


def _refused(exc: Refused) -> Answer:
    status, kind, param = _REFUSALS[exc.code]
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else {}
    message = f"{exc.message}; {_NEXT[exc.code]}" if exc.code in _NEXT else exc.message
    problems = [Problem(param, message, exc.code)] if status == 422 else []
    return Answer(status, kind, exc.code, message, param, problems, headers)


def _unavailable(what: str, code: str) -> Callable[[object], Answer]:
    message = f"{what} can't be reached right now; try again"
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return lambda _: Answer(503, "service_unavailable_error", code, message, headers=headers)


_USER_ERRORS: dict[str, tuple[int, ErrorType]] = {
    "file_not_found": (404, "not_found_error"),
    "unknown_after": (404, "not_found_error"),
    "webhook_endpoint_not_found": (404, "not_found_error"),
    "webhook_delivery_not_found": (404, "not_found_error"),
    "webhook_endpoint_disabled": (409, "conflict_error"),
    "too_many_webhook_endpoints": (429, "rate_limit_error"),
    "too_many_webhook_secrets": (429, "rate_limit_error"),
}
"""Codes of a UserError that are not a 422."""
_INFRASTRUCTURE_ERRORS: dict[str, tuple[int, ErrorType]] = {"too_many_estimates": (429, "rate_limit_error")}
"""Codes of an InfrastructureError that are not a 503."""


def _user_error(exc: UserError) -> Answer:
    error = exc.error
    if error.code in _USER_ERRORS:
        status, kind = _USER_ERRORS[error.code]
        return Answer(status, kind, error.code, error.message, error.param)
    return _problems([Problem(error.param, error.message, error.code)])


def _infrastructure_error(exc: InfrastructureError) -> Answer:
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    status, kind = _INFRASTRUCTURE_ERRORS.get(exc.error.code, (503, "service_unavailable_error"))
    return Answer(status, kind, exc.error.code, exc.error.message, exc.error.param, headers=headers)


def _http(exc: HTTPException) -> Answer:
    headers = dict(exc.headers or {})
    if exc.status_code == 404:
        return Answer(
            404, "not_found_error", "unknown_route", "there is no such route; GET /docs lists all routes", None
        )
    if exc.status_code == 405:
        message = f"this route answers {headers.get('Allow', 'other methods')} only"
        return Answer(405, "invalid_request_error", "method_not_allowed", message, headers=headers)
    return Answer(exc.status_code, "invalid_request_error", "bad_request", str(exc.detail), headers=headers)


def _disconnected(_: ClientDisconnect) -> Answer:
    return Answer(400, "invalid_request_error", "client_disconnected", "the body ended before it was complete")


TABLE: dict[type[Exception], Callable[[Any], Answer]] = {
    RequestRefused: lambda exc: exc.answer,
    ConfigProblems: _config_problems,
    UserError: _user_error,
    InfrastructureError: _infrastructure_error,
    RequestValidationError: _parameters,
    Refused: _refused,
    LogUnavailable: _unavailable("the event log", "log_unavailable"),
    RayActorError: _unavailable("the dispatcher", "dispatcher_unavailable"),
    WebhooksUnavailable: _unavailable("the store of webhook endpoints", "webhooks_unavailable"),
    HTTPException: _http,
    ClientDisconnect: _disconnected,
}


async def handle(request: Request, exc: Exception) -> Response:
    """The one exception handler: looks the exception up in the table."""
    if isinstance(exc, HTTPException) and exc.status_code == 405:
        exc.headers = {"Allow": ", ".join(_methods(request))}  # Starlette names only those of the path's first route
    describe = next(TABLE[kind] for kind in type(exc).__mro__ if kind in TABLE)
    answer = describe(exc)
    if answer.status == 422 and request.url.path.startswith("/v1/"):
        answer = replace(answer, status=400)  # as in OpenAI's API; its client raises BadRequestError for it
    return answer.response()


def _methods(request: Request) -> list[str]:
    """The methods that the routes of the request's path answer."""

    def answered(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    found = list(filter(answered, ("DELETE", "GET", "POST")))
    return [name for method in found for name in ((method, "HEAD") if method == "GET" else (method,))]


def unexpected(request_id: str) -> Answer:
    """The answer to a bug. The traceback is in the operator's log under `request_id`."""
    message = f"something went wrong on our side; the operator can find it in the log as request {request_id}"
    return Answer(500, "server_error", "internal_error", message)

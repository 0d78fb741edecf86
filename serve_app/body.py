"""Reads a request's JSON body, and checks its type and size."""

from typing import Any

from starlette.requests import Request

from serve_app.errors import Answer, RequestRefused
from trainers.planning.strict_json import parse_object


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body. Holds at most `max_bytes` and one chunk, whatever the headers say. Raises
    RequestRefused (413, 415) or ConfigProblems."""
    _require_json(request)
    return parse_object(await _read(request, max_bytes))


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and len(declared) < 20 and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestRefused:
    message = (
        f"the body is larger than the {max_bytes} bytes that TUNEWRIGHT_MAX_BODY_BYTES allows; a job's data is named "
        "in the request, not sent with it"
    )
    # The connection stays open, and the server discards the rest of the body: so the client can read the answer.
    return RequestRefused(Answer(413, "invalid_request_error", "body_too_large", message))


def _require_json(request: Request) -> None:
    """Also keeps pages of another origin from posting jobs: a browser sends this type across origins only after a CORS
    preflight request."""
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if media_type.strip().lower() == "application/json" and charset in ("", "utf-8"):
        return
    message = "send the body as UTF-8 JSON, with the header Content-Type: application/json"
    raise RequestRefused(Answer(415, "invalid_request_error", "unsupported_media_type", message))

"""Downloads that a client can resume where they broke off: a single range of bytes (RFC 9110, section 14)."""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from urllib.parse import quote

from starlette.requests import Request

from serve_app.errors import Answer, RequestRefused
from serve_app.streaming import Stream, is_head

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)


def download(
    request: Request,
    read: Callable[[int], AsyncGenerator[bytes, None]],
    *,
    size: int,
    etag: str,
    media_type: str,
    filename: str,
    close: Callable[[], object] = lambda: None,
) -> Stream:
    """A response with some bytes, or with the range of them that the request asks for. Raises RequestRefused 416 for a
    range beyond their end.

    `read(start)` yields the bytes from `start` on, and is called at most once. `close` is called when nothing more will
    be read, even if nothing was. `etag` has no quotes, and must differ whenever the bytes do.
    """
    quoted = f'"{etag}"'
    headers = {"Accept-Ranges": "bytes", "Content-Disposition": attachment(filename), "ETag": quoted}
    try:
        asked = _asked(request, size, quoted)
    except RequestRefused:
        close()
        raise
    part = range(size) if asked is None else asked
    headers["Content-Length"] = str(len(part))
    if asked is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
    body = _first(len(part), read(part.start))
    return Stream(body, media_type, headers, 200 if asked is None else 206, close)


def attachment(filename: str) -> str:
    """The value of Content-Disposition: in the plain form if the name allows it, since some clients (curl -J) don't
    read the form that takes any character."""
    escaped = quote(filename, safe="")
    return f'attachment; filename="{filename}"' if escaped == filename else f"attachment; filename*=UTF-8''{escaped}"


def _asked(request: Request, size: int, etag: str) -> range | None:
    """The range that the request asks for. None for all of the bytes: for HEAD, and if there is no range, an invalid
    one, more than one, or one of other bytes than these (`If-Range`)."""
    if is_head(request) or request.headers.get("if-range", etag) != etag:
        return None
    found = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    first, last = found.groups() if found else ("", "")
    if first:
        part = range(int(first), min(int(last) + 1, size) if last else size)
        if last and int(last) < int(first):
            return None
    elif last:
        part = range(max(size - int(last), 0), size)
    else:
        return None
    if not part:
        message = f"Range: there are {size} bytes, and it asks for none of them"
        headers = {"Content-Range": f"bytes */{size}"}
        raise RequestRefused(
            Answer(416, "invalid_request_error", "range_not_satisfiable", message, "Range", headers=headers)
        )
    return part


async def _first(length: int, content: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(content):
        async for chunk in content:
            yield chunk[:length]
            length -= len(chunk)
            if length <= 0:
                return

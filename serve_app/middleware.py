"""What happens around every request: its id, the headers every response carries, and the net under every bug."""

import logging
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from serve_app.errors import unexpected

log = logging.getLogger("tunewright.serve")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RequestContext:
    """Gives each request an id, answers an unexpected exception with it, and logs the traceback under it.

    A well-formed `x-request-id` of the client is kept, so that one id follows a request through several services.
    With `sends_id` False the id is not put on the response, because the server in front does that.
    """

    def __init__(self, app: ASGIApp, *, sends_id: bool = True) -> None:
        self._app = app
        self._sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if self._sends_id:
                    headers["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            log.exception("request %s (%s %s) failed", request_id, scope["method"], ascii(scope["path"]))
            if started:
                raise  # Half a response is out: cutting the connection is the only honest answer left.
            await unexpected(request_id)(scope, receive, send_with_headers)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{ULID()}"

"""The middleware around every request: its id, the headers of every response, and a 500 for every unexpected exception.

It also refuses requests that browsers send for pages of other sites. The service has no users and no cookies, so anyone
who reaches it may use it, and that includes any web page in an operator's browser. Browsers state the kind of page that
makes a request in Sec-Fetch-Site; over plain HTTP to hosts other than loopback they state only its Origin. Programs
send neither. A browser can't notice that the host name of a page's own site has been made to resolve to this service
(DNS rebinding); TUNEWRIGHT_HOSTS, the list of the service's host names, protects against that.
"""

import logging
import re
from collections.abc import Collection
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from serve_app.errors import Answer, unexpected

log = logging.getLogger("tunewright.serve")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")
_READS = {"GET", "OPTIONS"}
_DEFAULT_PORT = {"http": ":80", "https": ":443"}
_FROM_ANOTHER_SITE = Answer(
    403,
    "invalid_request_error",
    "cross_site",
    "a page of another site may not change anything here: call the API from a program, or from a page on its own site",
)
_MISDIRECTED = Answer(
    421,
    "invalid_request_error",
    "misdirected_request",
    "the service doesn't answer for the host that this request names: use its IP address, localhost, or a host name "
    "that its operator has added to TUNEWRIGHT_HOSTS",
)


class RequestContext:
    """Gives each request an id (`request.state.request_id`), answers an unexpected exception with it, and logs the
    traceback under it.

    A well-formed `x-request-id` of the client is kept, so that one id follows a request through several services.
    `hosts`: host names that are accepted besides localhost and IP addresses; none: all are. With `sends_id` False the
    id is not put on the response, because the server in front does that.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str] = (), sends_id: bool = True) -> None:
        self._app = app
        self._hosts = hosts
        self._sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        is_head = scope["method"] == "HEAD"
        scope.setdefault("state", {}).update(request_id=request_id, is_head=is_head)
        if is_head:  # routes for GET answer it; the server, whose own scope still says HEAD, sends no body
            scope = {**scope, "method": "GET"}
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

        if self._hosts and not _is_for(Headers(scope=scope).get("host", ""), self._hosts):
            await _MISDIRECTED.response()(scope, receive, send_with_headers)
            return
        if scope["method"] not in _READS and _from_another_site(Headers(scope=scope)):
            await _FROM_ANOTHER_SITE.response()(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            log.exception("request %s (%s %s) failed", request_id, scope["method"], ascii(scope["path"]))
            if started:
                raise  # A part of the response is sent: all that is left is to break the connection.
            await unexpected(request_id).response()(scope, receive, send_with_headers)


def _is_for(host: str, names: Collection[str]) -> bool:
    """Whether a Host header names localhost, one of `names`, or an IP address, which DNS rebinding can't forge. An
    empty one is accepted: programs may send none."""
    found = _HOST.fullmatch(host.lower())
    name = found[1].removesuffix(".") if found else host
    if name in ("", "localhost", *names):
        return True
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _from_another_site(headers: Headers) -> bool:
    """Whether a browser sent the request for a page of another site. Sec-Fetch-Site is right behind any proxy. Without
    it, Origin must match the Host that the client connected to, or the X-Forwarded-Host of a proxy that changed Host. A
    page can't forge that header: it would need a CORS preflight request, which this service doesn't allow."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None or origin is None:
        return site == "cross-site"
    scheme, _, own = origin.lower().partition("://")  # "", if the origin is "null", as of a page in a sandbox
    port = _DEFAULT_PORT.get(scheme, "")
    hosts = [headers.get("host", ""), headers.get("x-forwarded-host", "").partition(",")[0].strip()]
    return not own or own.removesuffix(port) not in [host.lower().removesuffix(port) for host in hosts]


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{ULID()}"

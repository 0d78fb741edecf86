"""What happens around every request: its id, the headers every response carries, and the net under every bug.

And a door that is shut to other websites: the service has no users and no cookies, so whoever reaches it may use it, a
page of anywhere in an operator's browser included. Browsers say of each request which kind of page made it, in
Sec-Fetch-Site; over plain HTTP, but to loopback, only of which origin it is. Programs say neither. What a browser
can't see is that the name of a page's own site has come to lead here (DNS rebinding). For that there are the names that
lead here by right: TUNEWRIGHT_HOSTS.
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
    `hosts`: the names that requests may be for, besides localhost and IP addresses; none: any name.
    With `sends_id` False the id is not put on the response, because the server in front does that.
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
        if is_head:  # all that answers a GET answers it; the server, whose scope stays as it is, leaves the body out
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
                raise  # Half a response is out: cutting the connection is the only honest answer left.
            await unexpected(request_id).response()(scope, receive, send_with_headers)


def _is_for(host: str, names: Collection[str]) -> bool:
    """Whether a Host names localhost, one of `names` or, as no page's own name can, an IP address. Programs may send
    none."""
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
    """Sec-Fetch-Site is right behind any proxy. Where it is absent, the origin must be what the client connected to:
    the Host, or what a proxy that changed it says it was. No page can say that itself: a browser asks before it sends
    X-Forwarded-Host for another origin's page, and nothing here allows it."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None or origin is None:
        return site == "cross-site"
    scheme, _, own = origin.lower().partition("://")  # of "null", of a page in a sandbox, nothing is left
    port = _DEFAULT_PORT.get(scheme, "")
    hosts = [headers.get("host", ""), headers.get("x-forwarded-host", "").partition(",")[0].strip()]
    return not own or own.removesuffix(port) not in [host.lower().removesuffix(port) for host in hosts]


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{ULID()}"

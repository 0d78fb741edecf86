"""Responses that are produced while they are sent."""

from collections.abc import AsyncGenerator, Callable, Mapping

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


def is_head(request: Request) -> bool:
    """Whether the request is a HEAD, which the middleware turns into a GET."""
    return bool(request.state.is_head)


class Stream(StreamingResponse):
    """A response with the bytes that `content` yields. When it ends, also because the client has gone, `content` is
    closed at once and `close` is called: an unfinished generator would otherwise keep its resources until it is garbage
    collected. For a HEAD, `content` isn't run."""

    def __init__(
        self,
        content: AsyncGenerator[bytes, None],
        media_type: str,
        headers: Mapping[str, str] | None = None,
        status_code: int = 200,
        close: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(content, status_code, headers, media_type)
        self._content = content
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not is_head(Request(scope)):
                await super().__call__(scope, receive, send)
                return
        finally:
            await self._content.aclose()
            self._close()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body"})

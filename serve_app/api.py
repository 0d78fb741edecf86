"""The ASGI application: routes + middleware + exception handlers, each from a module of its own."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache, lru_cache
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware import Middleware

from serve_app import errors, openapi, reference
from serve_app.backend import Backend
from serve_app.delivery import Deliveries
from serve_app.middleware import RequestContext
from serve_app.openai import chat, checkpoints, files, jobs, models, uploads, webhooks
from serve_app.routes import router as our_router
from serve_app.tail import Together
from trainers.answers import Answers

ROUTERS = (
    our_router,
    *(part.router for part in (files, uploads, jobs, checkpoints, models, chat, webhooks)),
)
THREADS = 64
"""Threads for blocking calls, mostly on files. Python's default is four more than there are cores: that many uploads to
a storage that doesn't answer would block every submit."""


def build_api(
    backend: Backend, answers: Answers, *, sends_request_id: bool = True, closing: asyncio.Event | None = None
) -> FastAPI:
    """The HTTP API in front of `backend`. Its only state are the responses that are being sent.

    `answers` answers POST /v1/chat/completions. `sends_request_id`: whether responses get their x-request-id here;
    False if the server in front adds it. `closing` is set when this server is about to end, so that open streams end
    before.
    """
    app = FastAPI(
        openapi_url=None,  # The document is served by a route of ours, and FastAPI's pages load scripts from a CDN.
        middleware=[Middleware(RequestContext, hosts=backend.settings.hosts, sends_id=sends_request_id)],
        lifespan=_with_threads,
        exception_handlers=dict.fromkeys(errors.TABLE, errors.handle),
    )
    app.state.backend = backend
    app.state.answers = answers
    app.state.closing = closing or asyncio.Event()
    app.state.deliveries = Deliveries()
    app.state.together = Together()
    for router in ROUTERS:
        app.include_router(router)

    @cache  # building this or a page takes a good part of a second: so the routes are plain functions, run in threads
    def document() -> dict[str, Any]:
        return openapi.describe([route for router in ROUTERS for route in router.routes])

    @lru_cache(8)  # one page for each name that the service is reached by
    def page(base_url: str) -> str:
        return reference.page(document(), base_url)

    @app.get("/openapi.json", include_in_schema=False)
    def openapi_json() -> Response:
        return JSONResponse(document())

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> Response:
        return HTMLResponse(page(str(request.base_url)))

    app.openapi = document  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _with_threads(_: FastAPI) -> AsyncIterator[None]:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="api"))
    yield

"""/v1/chat/completions: asks a base model, a tuned model or a checkpoint, through `trainers.answers.Answers`."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from ulid import ULID

from serve_app.body import read_object
from serve_app.errors import RETRY_AFTER_S, Answer, RequestRefused, unexpected
from serve_app.openai.chat_objects import (
    FinishReason,
    OpenAIChatAnswer,
    OpenAIChatChoice,
    OpenAIChatChunk,
    OpenAIChatCompletion,
    OpenAIChatDelta,
    OpenAIChatRequest,
    OpenAIChunkChoice,
    OpenAIUsage,
    without_unsupported,
)
from serve_app.openai.models import source_of
from serve_app.openai.tuned import unknown_model
from serve_app.openapi import documented_events, json_body
from serve_app.routes import TheBackend, parsed
from serve_app.streaming import Stream
from trainers.answers import Answers, Begun, Failed, Part, Piece, Question, Sampling
from trainers.data.dialog import RowError, check_order, for_template
from trainers.errors import ConfigProblems, Problem

router = APIRouter(prefix="/v1", default_response_class=Response)
T = TypeVar("T")
log = logging.getLogger("tunewright.serve")


@router.post(
    "/chat/completions",
    summary="Ask a model",
    openapi_extra=json_body(OpenAIChatRequest),
    responses=documented_events(OpenAIChatCompletion, "The answer.", 400, 404, 409, 413, 415, 429),
)
async def create(request: Request, backend: TheBackend) -> Response:
    """Ask a base model, the model of a job that has succeeded, or a checkpoint.

    The prompt is what the model's chat template makes of `messages`, as in training. The first question to a model
    waits until it is loaded. With `stream`, the answer comes as server-sent events, each an `OpenAIChatChunk`, the last
    one `[DONE]`; if an answer can't be completed, its last event has the error.
    """
    document = await read_object(request, backend.settings.max_body_bytes)
    asked = _read(document)
    question = Question(
        model=await source_of(backend.log, backend.settings, asked.model),
        messages=_turns(asked),
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        stop=tuple(asked.stop),
        sampling=Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
        ),
    )
    answers: Answers = request.app.state.answers
    parts = answers.answer(question)
    answer = _Answering(asked, request.state.request_id)
    try:
        prompt_tokens = await _while_connected(request, _begun(parts))
        if asked.stream:
            return Stream(answer.events(parts, prompt_tokens), "text/event-stream")
        whole = await _while_connected(request, answer.whole(parts, prompt_tokens))
        await parts.aclose()
    except BaseException:
        await parts.aclose()
        raise
    return JSONResponse(whole.model_dump(mode="json"))


class _Answering:
    """One answer as OpenAI's objects: a whole completion, or the chunks of a stream."""

    def __init__(self, asked: OpenAIChatRequest, request_id: str) -> None:
        self._request_id = request_id
        self._id = f"chatcmpl-{ULID()}"
        self._created = int(time.time())
        self._model = asked.model
        self._with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)

    async def whole(self, parts: AsyncGenerator[Part, None], prompt_tokens: int) -> OpenAIChatCompletion:
        text: list[str] = []
        end: FinishReason = "stop"
        tokens = 0
        async for piece in _pieces(parts):
            text.append(piece.text)
            end, tokens = piece.end or end, piece.tokens
        choice = OpenAIChatChoice(message=OpenAIChatAnswer(content="".join(text)), finish_reason=end)
        return OpenAIChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[choice],
            usage=_usage(prompt_tokens, tokens),
        )

    async def events(self, parts: AsyncGenerator[Part, None], prompt_tokens: int) -> AsyncGenerator[bytes, None]:
        tokens = 0
        try:
            yield self._chunk(OpenAIChatDelta(role="assistant", content=""))
            async for piece in _pieces(parts):
                tokens = piece.tokens
                if piece.text:
                    yield self._chunk(OpenAIChatDelta(content=piece.text))
                if piece.end is not None:
                    yield self._chunk(OpenAIChatDelta(), piece.end)
            if self._with_usage:
                yield self._chunk(None, usage=_usage(prompt_tokens, tokens))
            yield b"data: [DONE]\n\n"
        except RequestRefused as refused:
            yield _event(refused.answer)
        except Exception:
            log.exception("request %s failed in the middle of its answer", self._request_id)
            yield _event(unexpected(self._request_id))
        finally:
            await parts.aclose()

    def _chunk(
        self, delta: OpenAIChatDelta | None, end: FinishReason | None = None, usage: OpenAIUsage | None = None
    ) -> bytes:
        choices = [] if delta is None else [OpenAIChunkChoice(delta=delta, finish_reason=end)]
        chunk = OpenAIChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)
        document = chunk.model_dump_json(exclude=None if self._with_usage else {"usage"})
        return b"data: " + document.encode() + b"\n\n"


def _event(answer: Answer) -> bytes:
    """The server-sent event that ends a stream that can't go on."""
    return b"data: " + bytes(answer.response().body) + b"\n\n"


def _usage(prompt_tokens: int, tokens: int) -> OpenAIUsage:
    return OpenAIUsage(prompt_tokens=prompt_tokens, completion_tokens=tokens, total_tokens=prompt_tokens + tokens)


def _read(document: dict[str, object]) -> OpenAIChatRequest:
    """The checked request. Raises ConfigProblems with everything that is wrong."""
    rest, problems = without_unsupported(document)
    try:
        asked = parsed(OpenAIChatRequest, rest)
    except ConfigProblems as found:
        raise ConfigProblems(found.problems + problems) from None
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        problems.append(Problem("max_tokens", "is the old name of max_completion_tokens: send only one of the two"))
    if asked.stream_options is not None and not asked.stream:
        problems.append(Problem("stream_options", "needs stream: true"))
    if problems:
        raise ConfigProblems(problems)
    return asked


def _turns(asked: OpenAIChatRequest) -> tuple[dict[str, object], ...]:
    try:
        check_order(asked.messages)
        return for_template(asked.messages, "messages")
    except RowError as error:
        raise ConfigProblems([Problem("messages", f"{error}")]) from None


async def _begun(parts: AsyncGenerator[Part, None]) -> int:
    """Waits until the model has accepted the prompt. Returns the prompt's number of tokens. Raises RequestRefused."""
    async for part in parts:
        if isinstance(part, Failed):
            raise _refusal(part)
        if isinstance(part, Begun):
            return part.prompt_tokens
    raise RuntimeError("the answer ended before it began")


async def _pieces(parts: AsyncGenerator[Part, None]) -> AsyncIterator[Piece]:
    async for part in parts:
        if isinstance(part, Failed):
            raise _refusal(part)
        if isinstance(part, Piece):
            yield part


def _refusal(failed: Failed) -> RequestRefused:
    code, message, param = failed.error.code, failed.error.message, failed.error.param
    if failed.error.fault == "infrastructure":
        retry = {"Retry-After": str(RETRY_AFTER_S)}
        return RequestRefused(Answer(503, "service_unavailable_error", code, message, param, headers=retry))
    if code == "model_not_found":
        return unknown_model(message)
    return RequestRefused(Answer(400, "invalid_request_error", code, message, param, [Problem(param, message, code)]))


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. If the client disconnects first, cancels `work` and raises ClientDisconnect."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        gone.cancel()
        doing.cancel()
        await asyncio.wait({doing, gone})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

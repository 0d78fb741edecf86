"""Answers questions in this process."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from trainers.answers import Accepted, Begun, Failed, Part, Question
from trainers.errors import JobProblem

if TYPE_CHECKING:
    from trainers.models.chat_model import ChatModel

T = TypeVar("T")


class Engine:
    """`Answers` by the models that `load` gives.

    All computing is done on one thread, token by token in turn: as many questions as there may be share it evenly, none
    gets in the way of the event loop, and what nobody waits for any more stops after the token it is at.
    """

    def __init__(self, load: Callable[[str], Awaitable["ChatModel"]]) -> None:
        """`load` takes `Question.model`; it may raise UserError and InfrastructureError, and keeps what it likes."""
        self._load = load
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat")
        self._loading: set[asyncio.Future[ChatModel]] = set()

    async def answer(self, question: Question) -> AsyncGenerator[Part, None]:
        yield Accepted()
        try:
            model = await self._loaded(question.model)
            prompt = await self._run(lambda: model.prompt(question))
            yield Begun(len(prompt))
            pieces = model.answer(prompt, question)
            try:
                while (piece := await self._run(lambda: next(pieces, None))) is not None:
                    yield piece
            finally:
                self._thread.submit(pieces.close)  # after the token it is at; its keys and values go with it
        except JobProblem as problem:
            yield Failed(problem.error)

    async def _loaded(self, name: str) -> "ChatModel":
        """Loading goes on for the next one when who asked first goes away: a model that takes longer than a client
        waits would else be loaded again and again, several times at once."""
        loading = asyncio.ensure_future(self._load(name))
        self._loading.add(loading)  # the loop itself keeps only weak references to tasks
        loading.add_done_callback(self._loading.discard)
        return await asyncio.shield(loading)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

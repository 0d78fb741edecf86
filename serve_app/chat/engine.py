"""What engines have in common: the way from a question to the pieces of its answer."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Generic, NamedTuple, TypeVar

from trainers.answers import Accepted, Begun, Failed, Part, Piece, Question
from trainers.errors import JobProblem

M = TypeVar("M")


class Share(NamedTuple):
    """What each model may take of its machine."""

    gpus: int
    """It is spread over them. 0: it computes on the CPU."""
    gpu_memory: float
    """Of each of the GPUs, between 0 and 1."""
    cores: int
    """Without a GPU."""


class Engine(ABC, Generic[M]):
    """`Answers` by the models that `load` gives."""

    def __init__(self, load: Callable[[str], Awaitable[M]]) -> None:
        """`load` takes `Question.model`; it may raise UserError and InfrastructureError, and keeps what it likes."""
        self._load = load
        self._loading: set[asyncio.Future[M]] = set()

    async def answer(self, question: Question) -> AsyncGenerator[Part, None]:
        yield Accepted()
        try:
            model = await self._loaded(question.model)
            prompt = await self._prompt(model, question)
            yield Begun(len(prompt))
            async with aclosing(self._pieces(model, prompt, question)) as pieces:
                async for piece in pieces:
                    yield piece
        except JobProblem as problem:
            yield Failed(problem.error)

    @abstractmethod
    async def _prompt(self, model: M, question: Question) -> list[int]:
        """Its tokens. Raises UserError as `encode_question`."""

    @abstractmethod
    def _pieces(self, model: M, prompt: list[int], question: Question) -> AsyncGenerator[Piece, None]:
        """Up to one with an `end`. Closing it stops the work. Raises UserError and InfrastructureError."""

    async def _loaded(self, name: str) -> M:
        """Loading goes on for the next one when who asked first goes away: a model that takes longer than a client
        waits would else be loaded again and again, several times at once."""
        loading = asyncio.ensure_future(self._load(name))
        self._loading.add(loading)  # the loop itself keeps only weak references to tasks
        loading.add_done_callback(self._loading.discard)
        return await asyncio.shield(loading)

"""The base class of both engines: from a question to the pieces of its answer."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Generic, NamedTuple, TypeVar

from trainers.answers import Accepted, Begun, Failed, Part, Piece, Question
from trainers.errors import JobProblem

M = TypeVar("M")


class Share(NamedTuple):
    """What each vLLM model may take of its machine."""

    gpus: int
    """GPUs that the model is spread over. 0: it computes on the CPU."""
    gpu_memory: float
    """Share of the memory of each of these GPUs, between 0 and 1."""
    cores: int
    """Cores that it computes on without a GPU."""


class Engine(ABC, Generic[M]):
    """`Answers` from the models that `load` returns."""

    def __init__(self, load: Callable[[str], Awaitable[M]]) -> None:
        """`load` takes `Question.model`, and decides which models stay loaded. It may raise UserError and
        InfrastructureError."""
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
        """The tokens of the prompt. Raises UserError as `encode_question` does."""

    @abstractmethod
    def _pieces(self, model: M, prompt: list[int], question: Question) -> AsyncGenerator[Piece, None]:
        """The pieces of the answer, the last one with an `end`. Closing the generator stops the work. Raises UserError
        and InfrastructureError."""

    async def _loaded(self, name: str) -> M:
        """The model. Loading goes on if the client that asked first disconnects: otherwise a model that takes longer to
        load than clients wait would be loaded again and again, several times at once."""
        loading = asyncio.ensure_future(self._load(name))
        self._loading.add(loading)  # the loop itself keeps only weak references to tasks
        loading.add_done_callback(self._loading.discard)
        return await asyncio.shield(loading)

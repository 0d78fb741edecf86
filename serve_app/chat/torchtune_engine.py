"""Answers by torchtune's components, in this process."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from serve_app.chat.engine import Engine
from trainers.answers import Piece, Question
from trainers.errors import InfrastructureError, memory_short

if TYPE_CHECKING:
    from trainers.models.chat_model import Answering, ChatModel

AHEAD = 16
"""Pieces of an answer that may wait to be read. With so many waiting, no further token is made."""

T = TypeVar("T")


@dataclass(eq=False)
class _UnderWay:
    """An answer that is being made, and its pieces that have not been read yet."""

    answering: "Answering"
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    ended: bool = False

    def add(self, piece: Piece | Exception) -> None:
        self.pieces.put_nowait(piece)
        self.ended = isinstance(piece, Exception) or piece.end is not None


class TorchtuneEngine(Engine["ChatModel"]):
    """All computing is done on one thread, in turns. Each turn makes the next token of every answer of one model, which
    takes little longer than for one answer; then it is the next model's turn. So no answer waits for another to end,
    the event loop is never blocked, and an answer that nobody reads any more stops after the current token.
    """

    def __init__(self, load: Callable[[str], Awaitable["ChatModel"]]) -> None:
        super().__init__(load)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat")
        self._under_way: dict[ChatModel, list[_UnderWay]] = {}
        self._working: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    @property
    def busy(self) -> bool:
        """Whether answers are under way, or the last token of an abandoned answer is still being made."""
        return self._working is not None and not self._working.done()

    async def _prompt(self, model: "ChatModel", question: Question) -> list[int]:
        return await self._run(lambda: model.prompt(question))

    async def _pieces(self, model: "ChatModel", prompt: list[int], question: Question) -> AsyncGenerator[Piece, None]:
        mine = self._begin(model, prompt, question)
        try:
            while True:
                piece = await mine.pieces.get()
                self._news.set()  # there is room for another
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.end is not None:
                    return
        finally:
            self._leave(model, mine)

    def _begin(self, model: "ChatModel", prompt: Sequence[int], question: Question) -> _UnderWay:
        mine = _UnderWay(model.begin(prompt, question))
        self._under_way.setdefault(model, []).append(mine)
        self._news.set()
        if not self.busy:
            self._working = asyncio.create_task(self._work())
        return mine

    def _leave(self, model: "ChatModel", mine: _UnderWay) -> None:
        self._under_way[model].remove(mine)
        if not self._under_way[model]:
            del self._under_way[model]
        self._news.set()

    async def _work(self) -> None:
        """Makes token after token while answers are under way."""
        while self._under_way:
            self._news.clear()
            idle = True
            for model, all_ in list(self._under_way.items()):
                turn = [one for one in all_ if not one.ended and one.pieces.qsize() < AHEAD]
                if turn:
                    idle = False
                    for one, piece in zip(turn, await self._advanced(model, turn), strict=True):
                        one.add(piece)
            if idle:
                await self._news.wait()

    async def _advanced(self, model: "ChatModel", turn: Sequence[_UnderWay]) -> Sequence[Piece | Exception]:
        """The next piece of each answer, or its error. If memory is too short for all of them together, each is tried
        alone, so that one long dialog doesn't end the other answers. A failed try has changed nothing. torch raises a
        RuntimeError for short memory."""
        try:
            return await self._run(lambda: model.advance([one.answering for one in turn]))
        except (MemoryError, RuntimeError) as short:
            if len(turn) == 1:
                return [_no_room() if memory_short(short) else short]
            return [(await self._advanced(model, [one]))[0] for one in turn]
        except Exception as bug:  # noqa: BLE001  -- raised where the answer is read
            return [bug] * len(turn)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _no_room() -> InfrastructureError:
    message = "there is not enough memory for a dialog as long as this one and its answer"
    return InfrastructureError(
        "no_room", message, suggestion="try again when fewer questions are being answered, or with a shorter dialog"
    )

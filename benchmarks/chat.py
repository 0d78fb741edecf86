"""`python -m benchmarks.chat`: tokens a second of the process behind /v1/chat/completions, for one answer and for
several at a time. Takes a minute.

The real model, on as many cores as TUNEWRIGHT_CHAT_CPUS says (1, where it says nothing or 0); without Ray and HTTP.
"""

import asyncio
import time

from benchmarks.report import table
from benchmarks.service import machine
from benchmarks.workload import smollm2
from serve_app.chat.torchtune_engine import TorchtuneEngine
from trainers.answers import Failed, Piece, Question, Sampling
from trainers.models.chat_model import ChatModel, compute_on
from trainers.settings import settings

AT_A_TIME = (1, 2, 4, 8)
TOKENS = 60


def main() -> None:
    cores = max(1, int(settings().chat_cpus))
    compute_on(cores)
    model = ChatModel.load(smollm2())
    rows = asyncio.run(measured(model))
    print(f"{machine()}, `python -m benchmarks.chat`, {cores} {'core' if cores == 1 else 'cores'}.\n")
    print(table(("answers at a time", "tokens/s, all together", "of each"), rows))


async def measured(model: ChatModel) -> list[tuple[str, ...]]:
    async def load(_: str) -> ChatModel:
        return model

    engine = TorchtuneEngine(load)

    async def answered(number: int) -> int:
        """How many tokens the answer to a question of its own has."""
        messages = ({"role": "user", "content": f"Tell me a long story about the number {number} and the sea."},)
        count = 0
        async for part in engine.answer(Question("", messages, TOKENS, sampling=Sampling(temperature=0))):
            assert not isinstance(part, Failed), part.error
            count = part.tokens if isinstance(part, Piece) else count
        return count

    await answered(0)
    rows: list[tuple[str, ...]] = []
    for several in AT_A_TIME:
        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*map(answered, range(several))))
        speed = tokens / (time.perf_counter() - began)
        rows.append((f"{several}", f"{speed:.1f}", f"{speed / several:.1f}"))
    return rows


if __name__ == "__main__":
    main()

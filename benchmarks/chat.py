"""`python -m benchmarks.chat [--vllm]`: tokens/s of the engine behind /v1/chat/completions, for one answer and for
several at a time. Takes a minute.

It runs the real model on the CPU, on TUNEWRIGHT_CHAT_CPUS cores (1 if that is 0 or unset), without Ray and HTTP.
`--vllm` needs .venv-vllm, which `make test-vllm` makes.
"""

import argparse
import asyncio
import time
from typing import TYPE_CHECKING, Any

from benchmarks.report import heading, table
from benchmarks.workload import smollm2
from serve_app.chat.engine import Engine, Share
from serve_app.chat.torchtune_engine import TorchtuneEngine
from trainers.answers import Failed, Piece, Question, Sampling
from trainers.models.chat_model import ChatModel, compute_on
from trainers.settings import settings

if TYPE_CHECKING:
    from serve_app.chat.vllm_engine import VllmModel

AT_A_TIME = (1, 2, 4, 8)
TOKENS = 60


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat", description="Tokens a second of chat.")
    parser.add_argument("--vllm", action="store_true", help="by vLLM instead of torchtune's components")
    with_vllm = parser.parse_args().vllm
    cores = max(1, int(settings().chat_cpus))
    rows = asyncio.run(_by_vllm(cores) if with_vllm else _by_torchtune(cores))
    command = "python -m benchmarks.chat" + " --vllm" * with_vllm
    print(f"{heading(command, 'one core' if cores == 1 else f'{cores} cores')}\n")
    print(table(("answers at a time", "tokens/s, all together", "of each"), rows))


async def _by_torchtune(cores: int) -> list[tuple[str, ...]]:
    compute_on(cores)
    model = ChatModel.load(smollm2())

    async def load(_: str) -> ChatModel:
        return model

    return await measured(TorchtuneEngine(load))


async def _by_vllm(cores: int) -> list[tuple[str, ...]]:
    from serve_app.chat.vllm_engine import VllmEngine, VllmModels

    models = VllmModels(lambda _: smollm2(), Share(gpus=0, gpu_memory=0, cores=cores), 1, answers=max(AT_A_TIME))
    model = await models.load("")

    async def load(_: str) -> "VllmModel":
        return model

    return await measured(VllmEngine(load))


async def measured(engine: Engine[Any]) -> list[tuple[str, ...]]:
    async def answered(number: int) -> int:
        """The number of tokens of an answer. Each `number` is a different question."""
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

"""Answers by vLLM: the same as torchtune's components give. Run by `make test-vllm`, on the CPU."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app.chat import vllm_engine
from serve_app.chat.engine import Share
from serve_app.chat.vllm_engine import VllmEngine, VllmModel, VllmModels
from tests.generated import generated
from tests.tiny_models import make_tiny_model
from tests.waiting import async_eventually, eventually
from trainers.answers import Accepted, Begun, Failed, Part, Piece, Question, Sampling
from trainers.data.chat import ChatTokenizer
from trainers.errors import UserError

ASKED: tuple[dict[str, Any], ...] = ({"role": "user", "content": "What is the capital?"},)
GREEDY = Sampling(temperature=0)
WAIT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM has no attention for heads narrower than 32 on CPUs."""
    return tiny(tmp_path_factory.mktemp("models") / "tiny")


def tiny(path: Path, **config: Any) -> Path:
    return make_tiny_model(path, hidden_size=128, max_position_embeddings=4096, **config)


def with_engine(journey: Callable[[VllmEngine], Awaitable[None]], most: int = 1) -> None:
    """`most` models at a time; a further one takes the place of the one that was loaded first, as in the deployment."""

    async def run() -> None:
        models = VllmModels(Path, Share(gpus=0, gpu_memory=0.9, cores=1), most, answers=8)
        kept: dict[str, VllmModel] = {}
        one_at_a_time = asyncio.Lock()

        async def load(name: str) -> VllmModel:
            async with one_at_a_time:
                if name not in kept:
                    if len(kept) == most:
                        del kept[next(iter(kept))]
                    kept[name] = await models.load(name)
                return kept[name]

        await journey(VllmEngine(load))

    asyncio.run(run())
    eventually(lambda: not processes(), WAIT_S, lambda: f"left behind: {processes()}")


def processes() -> list[psutil.Process]:
    """vLLM's."""
    return [child for child in psutil.Process().children(recursive=True) if "VLLM" in child.name()]


def question(model: Path, max_tokens: int | None = 16, **changes: Any) -> Question:
    return Question(str(model), **{"messages": ASKED, "max_tokens": max_tokens, "sampling": GREEDY, **changes})


async def parts_of(answer: AsyncIterator[Part]) -> list[Part]:
    return [part async for part in answer]


async def text_of(answer: AsyncIterator[Part]) -> str:
    accepted, begun, *pieces = await parts_of(answer)
    assert isinstance(accepted, Accepted)
    assert isinstance(begun, Begun)
    assert all(isinstance(piece, Piece) for piece in pieces), pieces
    ends = [piece.end for piece in pieces if isinstance(piece, Piece)]
    assert ends[:-1] == [None] * (len(ends) - 1)
    assert ends[-1] is not None
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece))


def test_answers_are_those_of_torchtune_s_components_one_by_one_and_together(model: Path) -> None:
    questions = [({"role": "user", "content": word * number},) for number, word in enumerate(("a ", "sea ", "b "), 1)]
    expected = [generated(model, messages, 24)[1] for messages in questions]
    assert len(set(expected)) == 3

    async def journey(engine: VllmEngine) -> None:
        asked = [question(model, 24, messages=messages) for messages in questions]
        assert [await text_of(engine.answer(one)) for one in asked] == expected
        assert await asyncio.gather(*(text_of(engine.answer(one)) for one in asked)) == expected

        ids, text = generated(model, ASKED, 24)
        _, begun, *pieces = await parts_of(engine.answer(question(model, 24)))
        assert begun == Begun(len(ChatTokenizer.from_dir(model).encode_prompt(ASKED)))
        last = pieces[-1]
        assert isinstance(last, Piece)
        assert (last.tokens, last.end) == (len(ids), "length")
        stop = text[7:11]
        assert await text_of(engine.answer(question(model, 24, stop=(stop,)))) == text[: text.index(stop)]
        assert await text_of(engine.answer(question(model, 24, sampling=Sampling(1.5, top_p=0)))) == text

        def drawn(seed: int) -> Awaitable[str]:
            return text_of(engine.answer(question(model, 24, sampling=Sampling(1.5, seed=seed))))

        assert await drawn(7) == await drawn(7) != await drawn(8)
        assert await drawn(-1) == await drawn(-1)

        refused = await parts_of(engine.answer(question(model, 5000)))
        assert isinstance(refused[-1], Failed)
        assert refused[-1].error.code == "context_length_exceeded"

    with_engine(journey)


def test_an_abandoned_answer_is_stopped(model: Path) -> None:
    async def journey(engine: VllmEngine) -> None:
        answer = engine.answer(question(model, None, sampling=Sampling(2.0, seed=1)))
        async for part in answer:
            if isinstance(part, Piece):
                break
        held = await engine._loaded(str(model))
        unfinished = held._llm.output_processor.has_unfinished_requests
        assert unfinished()
        await answer.aclose()
        await async_eventually(lambda: not unfinished(), WAIT_S, lambda: "the answer is still being made")
        assert len(await text_of(engine.answer(question(model, 4)))) > 0  # and others can be asked

    with_engine(journey)


def test_a_model_takes_the_place_of_another_once_that_has_answered(model: Path, tmp_path: Path) -> None:
    other = tiny(tmp_path / "other", seed=5)
    at_most: list[int] = []

    async def journey(engine: VllmEngine) -> None:
        long = asyncio.create_task(text_of(engine.answer(question(model, 300))))
        await async_eventually(processes, WAIT_S, lambda: "vLLM does not start")
        short = asyncio.create_task(text_of(engine.answer(question(other))))
        while not short.done():
            at_most.append(len([one for one in processes() if "EngineCor" in one.name()]))
            await asyncio.sleep(0.1)
        assert await short == generated(other, ASKED, 16)[1]
        assert await long == generated(model, ASKED, 300)[1]

    with_engine(journey)
    assert max(at_most) == 1


def test_short_memory_makes_the_context_shorter_which_errors_say(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "CPU_CACHE_BYTES", 2 << 20)  # of 1 KiB a token

    async def journey(engine: VllmEngine) -> None:
        assert await text_of(engine.answer(question(model))) == generated(model, ASKED, 16)[1]
        refused = (await parts_of(engine.answer(question(model, 3000))))[-1]
        assert isinstance(refused, Failed)
        assert refused.error.code == "context_length_exceeded"
        takes = int(refused.error.message.split("context is ")[1].split()[0])
        assert 1000 < takes <= 2048

    with_engine(journey)


def test_a_process_that_dies_fails_its_answers_and_is_noticed(model: Path) -> None:
    async def journey(engine: VllmEngine) -> None:
        answer = engine.answer(question(model, None))
        seen: list[Part] = []
        async for part in answer:
            seen.append(part)
            if len(seen) == 4:
                for process in processes():
                    os.kill(process.pid, signal.SIGKILL)
        assert isinstance(seen[-1], Failed)
        assert (seen[-1].error.code, seen[-1].error.fault) == ("chat_unavailable", "infrastructure")
        assert (await engine._loaded(str(model))).is_dead

    with_engine(journey)


def test_a_directory_without_a_model_says_so(tmp_path: Path) -> None:
    async def journey(engine: VllmEngine) -> None:
        with pytest.raises(UserError):
            await engine._loaded(str(tmp_path))
        assert not processes()

    with_engine(journey)

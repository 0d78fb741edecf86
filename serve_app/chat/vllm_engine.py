"""Answers by vLLM (https://docs.vllm.ai), on GPUs if it is installed.

Each model has a vLLM engine in a process of its own. Only tokens are sent to it and come back: the prompt is made here,
by the chat template that the model was trained with.
"""

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from ulid import ULID

from serve_app.chat.engine import Engine, Share
from trainers.answers import Piece, Question
from trainers.data.chat import ChatTokenizer
from trainers.errors import InfrastructureError
from trainers.models.answer_text import AnswerText, encode_question
from trainers.models.architecture import inspect_model_dir

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger("tunewright.chat")

CPU_CACHE_BYTES = 1 << 30
"""Memory for the keys and values of each model on a CPU. On a GPU they take what the weights leave of its share."""
_ROOM_S = 60.0
"""How long loading a model waits for another one to finish its answers and make room."""
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # the address on which the engine's processes listen for each other
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


class VllmModel:
    """A model whose vLLM process is ended once nothing refers to this object any more."""

    def __init__(self, llm: "AsyncLLM", tokenizer: ChatTokenizer, gone: Callable[[], object]) -> None:
        """`gone` is called, in another thread, when the process of `llm` has ended."""
        self._llm = llm
        self._tokenizer = tokenizer
        self._context: int = llm.model_config.max_model_len
        weakref.finalize(self, _end, llm, gone).atexit = False

    @property
    def is_dead(self) -> bool:
        return bool(self._llm.errored)

    def prompt(self, question: Question) -> list[int]:
        """See `encode_question`."""
        return encode_question(question, self._tokenizer, self._context)

    async def pieces(self, prompt: list[int], question: Question) -> AsyncGenerator[Piece, None]:
        """The pieces of the answer, the last one with an `end`. Closing the generator stops the answer. Raises
        InfrastructureError."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        sampling = question.sampling
        max_tokens = question.max_tokens or self._context - len(prompt)
        params = SamplingParams(
            temperature=sampling.temperature if sampling.top_p > 0 else 0.0,  # vLLM has no top_p of 0
            top_p=sampling.top_p or 1.0,
            seed=None if sampling.seed is None else sampling.seed % 2**63,  # to vLLM, -1 is no seed
            max_tokens=max_tokens,
            stop_token_ids=sorted(self._tokenizer.eos_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        text = AnswerText(self._tokenizer, question.stop, max_tokens)
        try:
            async with aclosing(self._llm.generate(tokens_input(prompt), params, f"{ULID()}")) as outputs:
                async for output in outputs:
                    for token in output.outputs[0].token_ids:
                        yield (piece := text.add(token))
                        if piece.end is not None:
                            return
        except EngineDeadError as error:
            raise InfrastructureError(
                "chat_unavailable", f"the model's process ended ({type(error).__name__})", suggestion="try again"
            ) from error


class VllmModels:
    """Starts models. At most `most` exist at a time, because the next one needs the memory that the last one held."""

    def __init__(self, resolve: Callable[[str], Path], share: Share, most: int, answers: int) -> None:
        """`resolve` returns the directory of the model that `Question.model` names. It may raise UserError and
        InfrastructureError. `answers`: maximum number of answers that a model makes at a time."""
        self._resolve = resolve
        self._share = share
        self._answers = answers
        self._room = threading.Semaphore(most)
        self._started: weakref.WeakSet[VllmModel] = weakref.WeakSet()

    async def load(self, name: str) -> VllmModel:
        """Starts the model, which takes vLLM half a minute or more. Raises UserError if there is no such model, and
        InfrastructureError `no_room` if there is no room beside the others or vLLM can't start with it."""
        directory = await asyncio.to_thread(self._resolve, name)
        if not await asyncio.to_thread(self._room.acquire, timeout=_ROOM_S):
            message = "other models are being asked, and there is no room for one more"
            raise InfrastructureError("no_room", message, suggestion="try again when one of them has answered")
        try:
            llm, tokenizer = await asyncio.to_thread(_start, directory, self._share, self._answers)
        except BaseException:
            self._room.release()
            raise
        model = VllmModel(llm, tokenizer, self._room.release)
        self._started.add(model)
        return model

    def check(self) -> None:
        """Raises RuntimeError when a model's process has died."""
        if any(model.is_dead for model in self._started):
            raise RuntimeError("the process of a model has died")


class VllmEngine(Engine[VllmModel]):
    """vLLM makes the answers of one model together, in each step a token of each."""

    def __init__(self, load: Callable[[str], Awaitable[VllmModel]]) -> None:
        super().__init__(load)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat")  # which alone uses the tokenizers

    async def _prompt(self, model: VllmModel, question: Question) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, model.prompt, question)

    def _pieces(self, model: VllmModel, prompt: list[int], question: Question) -> AsyncGenerator[Piece, None]:
        return model.pieces(prompt, question)


def _start(directory: Path, share: Share, answers: int) -> tuple["AsyncLLM", ChatTokenizer]:
    inspect_model_dir(directory)  # raises UserError if there is no model in it
    tokenizer = ChatTokenizer.from_dir(directory)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if share.gpus:
        device: dict[str, object] = {"dtype": "bfloat16", "gpu_memory_utilization": share.gpu_memory}
        if share.gpus > 1:
            device |= {"tensor_parallel_size": share.gpus, "distributed_executor_backend": "mp"}
    else:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = f"{share.cores}"
        # Compiling would take longer than it saves in a few answers.
        device = {"dtype": "float32", "kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True}
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(directory),
        load_format="safetensors",  # nothing that could run code
        trust_remote_code=False,
        skip_tokenizer_init=True,
        generation_config="vllm",  # the defaults are the API's, not those in the model's generation_config.json
        max_model_len=-1,  # as much of the model's context as memory allows
        max_num_seqs=answers,
        disable_log_stats=True,
        **device,
    )
    try:
        return AsyncLLM.from_engine_args(arguments), tokenizer
    except (RuntimeError, ValueError) as error:
        logger.exception("vLLM could not start with %s", directory)
        raise InfrastructureError(
            "no_room",
            f"vLLM could not start with this model ({type(error).__name__}), most often because there is not enough "
            "memory",
            suggestion="the log of the chat replica says why; TUNEWRIGHT_CHAT_MODELS=1 gives one model all of the GPU, "
            "and TUNEWRIGHT_CHAT_ENGINE=torchtune does without vLLM",
        ) from error


def _end(llm: "AsyncLLM", gone: Callable[[], object]) -> None:
    """Ends the process in a thread, because that takes seconds. vLLM kills a process that takes too long to end, but
    doesn't wait for it; until it has ended and been joined, it holds memory or stays a zombie."""
    processes = llm.engine_core.resources.engine_manager.processes

    def end() -> None:
        try:
            llm.shutdown()
            for process in processes:
                process.join(_ROOM_S)
        finally:
            gone()

    threading.Thread(target=end, name="vllm-shutdown", daemon=True).start()

"""Chat on Ray Serve: a deployment that scales to zero while nobody asks, and the API's client of it."""

import asyncio
import importlib.util
import logging
import math
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from events.actors import log_with_times
from serve_app.chat.engine import Engine, Share
from serve_app.chat.torchtune_engine import TorchtuneEngine
from serve_app.errors import RETRY_AFTER_S, Answer, RequestRefused
from serve_app.replica import listen_on_node_address_only
from trainers.answers import Part, Question
from trainers.dispatching.cluster import Cluster
from trainers.models.resolve import resolve_model
from trainers.priority import give_way
from trainers.settings import SHORTEST_IDLE_S, Settings

if TYPE_CHECKING:
    from trainers.models.chat_model import ChatModel

logger = logging.getLogger("tunewright.chat")

START_S = 180.0
"""How long a question waits for a replica. One starts within seconds, unless jobs hold the CPUs or GPUs that it
reserves, or the autoscaler has to add a node first."""
ONGOING, ONGOING_WITH_VLLM, QUEUED = 8, 128, 64
"""Questions that a replica answers at a time (with torchtune's components, with vLLM), and questions that may wait
before further ones get a 429."""
VLLM_GPU_MEMORY = 0.9
"""Share of a GPU's memory that all vLLM models take together. The rest is for CUDA itself."""
LOOK_BACK_S = SHORTEST_IDLE_S
"""Serve scales by the average number of questions over this time, so the downscale delay begins this long after the
last question."""


class Chat:
    """One replica. Holds the `chat_models` models that were asked last. The first question to a model loads it."""

    def __init__(self, settings: Settings, share: Share | None) -> None:
        """`share` is for vLLM. None: torchtune's components answer."""
        log_with_times()
        listen_on_node_address_only()
        give_way()
        see_reserved_gpus_only()
        self._engine, self._check = _with_torchtune(settings) if share is None else _with_vllm(settings, share)

    async def answer(self, question: Question) -> AsyncGenerator[Part, None]:
        async for part in self._engine.answer(question):
            yield part

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises a few times in a row."""
        self._check()


def see_reserved_gpus_only() -> None:
    """Hides the node's GPUs, which training jobs use, from a replica that reserves none: Ray doesn't."""
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _with_torchtune(settings: Settings) -> tuple[Engine[Any], Callable[[], None]]:
    held: WeakSet[ChatModel] = WeakSet()

    async def load_chat_model(model: str) -> "ChatModel":
        loaded = await asyncio.to_thread(_load_here, model, settings, list(held))
        held.add(loaded)
        return loaded

    keep = serve.multiplexed(max_num_models_per_replica=settings.chat_models)
    return TorchtuneEngine(keep(load_chat_model)), lambda: None


def _with_vllm(settings: Settings, share: Share) -> tuple[Engine[Any], Callable[[], None]]:
    from serve_app.chat.vllm_engine import VllmEngine, VllmModel, VllmModels

    def resolve(model: str) -> Path:
        return resolve_model(model, settings, logger.info)

    models = VllmModels(resolve, share, settings.chat_models, ONGOING_WITH_VLLM)

    async def load_vllm_model(model: str) -> VllmModel:
        return await models.load(model)

    keep = serve.multiplexed(max_num_models_per_replica=settings.chat_models)
    return VllmEngine(keep(load_vllm_model)), models.check


def load(model: str, settings: Settings, beside: Sequence["ChatModel"] = ()) -> "ChatModel":
    """Loads the model that `Question.model` names, and fetches it first if necessary. Blocks. `beside`: loaded models
    whose weights it may share."""
    from trainers.models.chat_model import ChatModel

    return ChatModel.load(resolve_model(model, settings, logger.info), beside)


def _load_here(model: str, settings: Settings, beside: Sequence["ChatModel"]) -> "ChatModel":
    from trainers.models.chat_model import compute_on

    compute_on(_cores(settings))
    return load(model, settings, beside)


class RemoteAnswers:
    """`Answers` from the deployment. Raises RequestRefused if it can't be reached or is overloaded."""

    def __init__(self, chat: DeploymentHandle[Any]) -> None:
        self._chat = chat

    async def answer(self, question: Question) -> AsyncGenerator[Part, None]:
        chat = self._chat.options(stream=True, multiplexed_model_id=question.model)
        parts: Any = chat.answer.remote(question)  # its kind depends on `stream`, which a type checker can't see
        try:
            async with asyncio.timeout(START_S):
                accepted: Part = await anext(parts)
            yield accepted
            async for part in parts:
                yield part
        except BackPressureError:
            raise _refused(429, f"{QUEUED} questions are already waiting; try again") from None
        except TimeoutError:
            message = f"no process could take the question within {START_S:.0f} s: it answers others, or jobs hold the "
            message += "GPU or the CPUs that it needs; try again"
            raise _refused(503, message) from None
        except RayTaskError:
            raise  # a bug of ours, which a retry would meet again
        except (RayError, RayServeException) as error:
            raise _refused(503, f"the model's process ended ({type(error).__name__}); try again") from error
        finally:
            with suppress(RayError, RayServeException):  # raised again for a question that no replica has accepted
                parts.cancel()


def _refused(status: int, message: str) -> RequestRefused:
    retry = {"Retry-After": str(RETRY_AFTER_S)}
    if status == 429:
        return RequestRefused(Answer(429, "rate_limit_error", "too_many_questions", message, headers=retry))
    return RequestRefused(Answer(503, "service_unavailable_error", "chat_unavailable", message, headers=retry))


def application(settings: Settings) -> Application:
    """Raises ValueError for an engine that is not installed."""
    reserved = gpus(settings)
    share = _share(settings, reserved)
    return deployment(settings, reserved, share).bind(settings, share)


def deployment(settings: Settings, reserved: float, share: Share | None = None) -> Deployment:
    """The deployment, which scales to zero after about `chat_idle_s` without a question. A replica reserves `reserved`
    GPUs; `share` is for vLLM."""
    ongoing = ONGOING if share is None else ONGOING_WITH_VLLM
    return serve.deployment(
        name="chat",
        max_ongoing_requests=ongoing,
        max_queued_requests=QUEUED,
        autoscaling_config=AutoscalingConfig(
            min_replicas=0,
            max_replicas=1,
            target_ongoing_requests=ongoing / 2,
            upscale_delay_s=0,
            look_back_period_s=LOOK_BACK_S,
            downscale_delay_s=settings.chat_idle_s - LOOK_BACK_S,
        ),
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": settings.chat_cpus, "num_gpus": reserved},
    )(Chat)


def _share(settings: Settings, reserved: float) -> Share | None:
    """What each vLLM model may take of a replica that reserves `reserved` GPUs. None: torchtune's components answer.

    Raises ValueError if vLLM is required but not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if settings.chat_engine == "vllm" and not installed:
        raise ValueError(
            "TUNEWRIGHT_CHAT_ENGINE is vllm, which is not installed; docs/openai.md says how to install it"
        )
    if settings.chat_engine == "torchtune" or not installed or (settings.chat_engine == "auto" and not reserved):
        return None
    memory = VLLM_GPU_MEMORY * min(1.0, reserved) / settings.chat_models
    return Share(math.ceil(reserved), memory, _cores(settings))


def _cores(settings: Settings) -> int:
    """Cores for a model on the CPU. The machine's other cores are for jobs."""
    return max(1, int(settings.chat_cpus))


def gpus(settings: Settings) -> float:
    """GPUs that a replica reserves. If no setting says so: 1 if this process is connected to a cluster that has GPUs or
    can scale up to some."""
    if settings.chat_gpus is not None:
        return settings.chat_gpus
    if settings.use_gpu is not None or not ray.is_initialized():
        return float(bool(settings.use_gpu))
    return float(Cluster().capacity().has_gpus)

"""The dispatcher as a Ray actor, one per cluster, and its client for other processes.

The actor has the settings of the deploy that started it, and so have the runners that it starts. A later deploy
replaces it. That is like any other restart: it has no state to lose (see `dispatcher`), and runs the code that the head
node has by then.
"""

import asyncio
import logging
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from events.actors import NAMESPACE, Handles, connect, log_with_times
from events.log import LogUnavailable
from trainers.dispatching.admission import Capacity
from trainers.dispatching.cluster import Cluster
from trainers.dispatching.dispatcher import Dispatcher
from trainers.settings import Settings
from trainers.webhooks.deliverer import Webhooks

logger = logging.getLogger("tunewright.dispatcher")

NAME = "tunewright-dispatcher"
ANSWER_S = 60.0
"""Seconds for a dispatcher to start and answer. It may have to wait for the event log."""
LOG_AGAIN_S = 5.0
"""Seconds between two attempts to reach the event log, each of which may take 30 s."""
_PAUSE_S = 0.05  # between two looks; the name of a killed actor is free a moment later


class DispatcherActor:
    """`Dispatcher` as an actor: its passes start with the actor, also when Ray restarts it. Webhooks are sent from
    here, too: they follow the same log, wait most of the time, and need no process of their own."""

    # Ray awaits it, on the actor's loop.
    async def __init__(self, settings: Settings, deployed_at: float) -> None:  # type: ignore[misc]
        log_with_times()
        handles = await _handles(settings)
        self._deployed_at = deployed_at
        self._dispatcher = Dispatcher(handles.log, handles.lines, Cluster(), settings)
        self._webhooks = Webhooks(handles.log, settings)
        self._work = [asyncio.create_task(self._dispatcher.run()), asyncio.create_task(self._webhooks.run())]

    async def deployed_at(self) -> float:
        return self._deployed_at

    async def whys(self) -> dict[str, str]:
        return self._dispatcher.whys()

    async def capacity(self) -> Capacity:
        return await self._dispatcher.capacity()

    async def drain(self, timeout_s: float) -> list[str]:
        return await self._dispatcher.drain(timeout_s)

    async def webhooks(self, method: str, *arguments: object, **options: object) -> Any:  # noqa: ANN401  -- as the method
        """A method of `Webhooks`."""
        return await getattr(self._webhooks, method)(*arguments, **options)


async def _handles(settings: Settings) -> Handles:
    """Handles to the log's actors. Waits for them without a limit: Ray would not repeat a failed start of the
    dispatcher. Raises StorageMismatchError."""
    while True:
        try:
            return await asyncio.to_thread(connect, settings.storage)
        except LogUnavailable as error:
            logger.warning("%s; the dispatcher waits for it", error)
            await asyncio.sleep(LOG_AGAIN_S)


class DispatcherClient:
    """Calls the cluster's dispatcher, also after it was replaced. To be used from one event loop."""

    def __init__(self, settings: Settings, deployed_at: float | None = None) -> None:
        """See `start_dispatcher`."""
        self._settings = settings
        self._deployed_at = deployed_at
        self._actor = start_dispatcher(settings, deployed_at)
        self._starting: asyncio.Task[None] | None = None

    async def call(self, method: str, *arguments: object, **options: object) -> Any:  # noqa: ANN401  -- as the method
        """The method's result. Raises the method's error as a RayTaskError, Ray's other errors, and those of
        `start_dispatcher`."""
        try:
            return await getattr(self._actor, method).remote(*arguments, **options)
        except RayActorError:  # it was replaced, or killed for good
            if self._starting is None:
                self._starting = asyncio.create_task(self._start())
            await asyncio.shield(self._starting)  # shared by all callers, and not cancelled with one
            return await getattr(self._actor, method).remote(*arguments, **options)

    async def _start(self) -> None:
        try:
            self._actor = await asyncio.to_thread(start_dispatcher, self._settings, self._deployed_at)
        finally:
            self._starting = None


def start_dispatcher(settings: Settings, deployed_at: float | None = None) -> "ActorHandle[DispatcherActor]":
    """The cluster's dispatcher; starts one if there is none. Blocks.

    `deployed_at`, a Unix time, is when this process's deploy was built. The dispatcher of an earlier deploy, or of
    none, is replaced; that of a later one stays. None: this process belongs to no deploy, and any existing dispatcher
    stays. Raises TimeoutError.
    """
    options = {
        "name": NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 1000,
        "num_cpus": 0,
        "resources": {"node:__internal_head__": 0.001},  # beside the dashboard that it starts Ray Jobs through
    }
    make = ray.remote(DispatcherActor).options(**options)
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            actor: ActorHandle[DispatcherActor] = make.remote(settings, deployed_at or 0.0)  # type: ignore[assignment]
            if deployed_at is None:
                return actor
            of = _deployed_at(actor, deadline - time.monotonic())
        # Another process of this deploy may have replaced it meanwhile (a ValueError: during the look-up of its name).
        except (RayActorError, GetTimeoutError, ValueError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no dispatcher answers within {ANSWER_S:g} s: {error}") from error
            time.sleep(_PAUSE_S)
            continue
        if of >= deployed_at:
            if of > deployed_at:
                logger.error("the dispatcher is of a later deploy, by %.1f s, and stays", of - deployed_at)
            return actor
        logger.warning("the dispatcher of an earlier deploy, by %.1f s, is replaced", deployed_at - of)
        ray.kill(actor)
        while _is_named(actor) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)


def _deployed_at(actor: "ActorHandle[DispatcherActor]", timeout_s: float) -> float:
    ask: Any = getattr(actor, "deployed_at", None)
    if ask is None:  # it was started by a version that had no such method
        return 0.0
    answer: float = ray.get(ask.remote(), timeout=max(timeout_s, 0.0))
    return answer


def _is_named(actor: "ActorHandle[DispatcherActor]") -> bool:
    try:
        return bool(ray.get_actor(NAME, NAMESPACE) == actor)
    except ValueError:  # no actor has the name
        return False

"""The parts behind the door, as the API and the command line see them: event log, log lines, dispatcher."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from ray.exceptions import RayError

from events.actors import connect
from events.facts import Resources
from events.log import LogUnavailable
from trainers.admission import Capacity, for_workers, infeasible
from trainers.dispatcher import start_dispatcher
from trainers.errors import ConfigProblems, Problem
from trainers.plan import Plan
from trainers.settings import Settings

T = TypeVar("T")

FIRST_ANSWER_S = 10.0
"""A dispatcher that is starting, or starting again, answers within seconds."""
NEXT_ANSWER_S = 0.5
"""Once there is an answer to fall back on, nobody waits longer than this."""


class _Recent(Generic[T]):
    """The last answer of `ask`, asked again when it is older than `max_age_s`: one question serves many requests.

    While the other side can't be reached, the last answer stands; without one, LogUnavailable is raised.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], max_age_s: float) -> None:
        self._ask = ask
        self._max_age_s = max_age_s
        self._answer: T | None = None
        self._asked = float("-inf")
        self._asking = asyncio.Lock()

    async def get(self) -> T:
        async with self._asking:
            if self._answer is None or time.monotonic() - self._asked > self._max_age_s:
                await self._renew()
        assert self._answer is not None  # noqa: S101  -- _renew has raised otherwise
        return self._answer

    async def _renew(self) -> None:
        try:
            async with asyncio.timeout(FIRST_ANSWER_S if self._answer is None else NEXT_ANSWER_S):
                self._answer = await self._ask()
        except (RayError, TimeoutError) as error:
            if self._answer is None:
                raise LogUnavailable(f"the dispatcher does not answer: {error}") from error
        self._asked = time.monotonic()


class Service:
    """Handles to the actors of one cluster; each survives the actor's restart."""

    def __init__(self, settings: Settings) -> None:
        handles = connect(settings.storage)
        self.settings = settings
        self.log = handles.log
        self.logs = handles.lines
        dispatcher = start_dispatcher(settings)
        self._whys = _Recent[dict[str, str]](lambda: dispatcher.whys.remote(), max_age_s=0.5)
        self._capacity = _Recent[Capacity](lambda: dispatcher.capacity.remote(), max_age_s=5)

    async def whys(self) -> dict[str, str]:
        """For each job that waits, why."""
        return await self._whys.get()

    async def resources(self, plan: Plan) -> Resources:
        """What the plan's workers will hold on this cluster.

        Raises ConfigProblems when neither the cluster nor its autoscaler could ever provide that.
        """
        capacity = await self._capacity.get()
        use_gpu = capacity.has_gpus if self.settings.use_gpu is None else self.settings.use_gpu
        resources = for_workers(plan.nnodes, plan.nproc_per_node, self.settings.cpus_per_worker, 1 if use_gpu else 0)
        reason = infeasible(resources, capacity)
        if reason:
            raise ConfigProblems([Problem("overrides", reason, "infeasible_resources")])
        return resources


def start(settings: Settings) -> Service:
    """Connect to the service's actors on this Ray cluster, starting what isn't there."""
    return Service(settings)

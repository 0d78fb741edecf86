"""A cluster in memory, the log, and the dispatcher between them, for tests of the dispatcher."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from events.facts import Event, JobSubmitted
from events.ids import new_event_id, new_job_id
from events.job import FineTuningJob
from events.log import EventLog
from events.log_queue import LogQueue
from events.memory import MemoryStore
from tests.events.facts_of_a_job import VALIDATED, started
from trainers.dispatching.admission import Capacity, Node, for_workers
from trainers.dispatching.cluster import Cluster, Runner, RunnerState
from trainers.dispatching.dispatcher import Dispatcher
from trainers.settings import Settings


@dataclass
class InMemoryCluster(Cluster):
    """A cluster of `cpus` CPUs whose runners do what the test says. Stopping takes until the test lets go."""

    cpus: float = 2
    runners: dict[str, RunnerState] = field(default_factory=dict)
    groups: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)  # to start, with success or without
    stopping: list[str] = field(default_factory=list)
    told: str = "killed by the test"  # of a runner that ended
    held: dict[str, float] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)  # jobs on a node that is about to go
    broken: set[str] = field(default_factory=set)
    unstartable: set[str] = field(default_factory=set)
    remembered: set[str] = field(default_factory=set)  # jobs whose ended runner can't be forgotten yet
    unforgettable: set[str] = field(default_factory=set)  # and those for which Ray fails to
    unremovable: set[str] = field(default_factory=set)  # groups for which Ray fails

    def capacity(self) -> Capacity:
        free = self.cpus - sum(self.held.values())
        return Capacity(nodes=(Node(self.cpus, 0),), free=(Node(free, 0),))

    def start_runner(self, job_id: str, settings_env: dict[str, str]) -> None:
        assert self.runners.get(job_id, "absent") == "absent"
        self.tried.append(job_id)
        if job_id in self.unstartable:
            raise RuntimeError("500 Internal Server Error")
        self.runners[job_id] = "alive"
        self.started.append(job_id)

    def runner(self, job_id: str) -> Runner:
        if job_id in self.broken:
            raise RuntimeError("500 Internal Server Error")
        if job_id not in self.runners:
            return Runner("absent")
        return Runner(self.runners[job_id], self.told, self.started.count(job_id))

    def stop_runner(self, job_id: str) -> None:
        self.stopping.append(job_id)

    def forget_runner(self, job_id: str) -> bool:
        if job_id in self.unforgettable:
            raise RuntimeError("500 Internal Server Error")
        if job_id in self.remembered:
            return False
        del self.runners[job_id]
        return True

    def placement_groups(self) -> dict[str, list[tuple[str, str]]]:
        return self.groups

    def remove_placement_group(self, group_id: str) -> None:
        if group_id in self.unremovable:
            raise RuntimeError("the control store does not answer")
        self.groups = {name: [g for g in groups if g[0] != group_id] for name, groups in self.groups.items()}

    def on_draining_nodes(self) -> frozenset[str]:
        return frozenset(self.draining)

    def place(self, job_id: str, cpus: float) -> None:
        """Ray has reserved the job's resources."""
        self.held[job_id] = cpus
        self.groups[job_id] = [(f"group-of-{job_id}", "CREATED")]

    def free(self, job_id: str) -> None:
        self.held.pop(job_id, None)
        self.groups.pop(job_id, None)


@dataclass
class World:
    log: EventLog
    cluster: InMemoryCluster
    dispatcher: Dispatcher
    storage: Path

    async def submit(self, workers: int = 1, max_restarts: int = 1) -> str:
        job_id = new_job_id()
        event = JobSubmitted(
            config={"model": "m", "data": "d"},
            resources=for_workers(1, workers, 1, 0),
            max_restarts=max_restarts,
            submission_id=job_id,
        )
        await self.log.submit(job_id, event, new_event_id(), 100)
        return job_id

    async def tell(self, job_id: str, *events: Event) -> None:
        await self.log.append(job_id, list(events), [new_event_id() for _ in events])

    async def job(self, job_id: str) -> FineTuningJob:
        return await self.log.job(job_id)

    async def lines(self, job_id: str) -> list[str]:
        """What the job's log has by now."""
        return [line["message"] for line in (await LogQueue(self.storage).read(job_id)).lines]

    def another_dispatcher(self) -> Dispatcher:
        """As one that is started anew finds the log and the cluster."""
        return dispatcher_of(self.log, self.cluster, self.storage)

    async def pass_(self, times: int = 1) -> None:
        for _ in range(times):
            await self.dispatcher.reconcile()

    async def validated(self, workers: int = 1, max_restarts: int = 1) -> str:
        """A job whose runner is there and whose data is checked."""
        job_id = await self.submit(workers, max_restarts)
        await self.pass_()
        await self.tell(job_id, VALIDATED)
        return job_id

    async def running(self, workers: int = 1, max_restarts: int = 1) -> str:
        job_id = await self.validated(workers, max_restarts)
        await self.pass_()
        self.cluster.place(job_id, workers)
        await self.tell(job_id, started(1))
        return job_id


def dispatcher_of(log: EventLog, cluster: InMemoryCluster, storage: Path) -> Dispatcher:
    return Dispatcher(log, LogQueue(storage), cluster, Settings(storage=storage))


def in_world(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            log, cluster = EventLog(MemoryStore()), InMemoryCluster()
            with tempfile.TemporaryDirectory() as storage:
                dispatcher = dispatcher_of(log, cluster, Path(storage))
                await test(World(log, cluster, dispatcher, Path(storage)))

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run

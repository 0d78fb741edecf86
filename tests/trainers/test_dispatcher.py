"""The dispatcher against a cluster in memory: whatever the log and the cluster say, passes bring them together."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from events.facts import (
    CancelRequested,
    DataValidated,
    Event,
    JobResumed,
    JobSubmitted,
    JobSucceeded,
    PauseRequested,
    RunInterrupted,
    RunStarted,
)
from events.ids import new_event_id, new_job_id
from events.job import FineTuningJob
from events.log import EventLog
from events.memory import MemoryStore
from tests.events.facts_of_a_job import REPORT
from trainers.admission import Capacity, Node, for_workers
from trainers.cluster import Runner, RunnerState
from trainers.dispatcher import Dispatcher
from trainers.settings import Settings


@dataclass
class InMemoryCluster:
    """A cluster of `cpus` CPUs whose runners do what the test says. Stopping takes until the test lets go."""

    cpus: float = 2
    runners: dict[str, RunnerState] = field(default_factory=dict)
    groups: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    stopping: list[str] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)  # jobs on a node that is about to go
    broken: set[str] = field(default_factory=set)

    def capacity(self) -> Capacity:
        free = self.cpus - sum(self.held.values())
        return Capacity(nodes=(Node(self.cpus, 0),), free=(Node(free, 0),))

    def start_runner(self, job_id: str, settings_env: dict[str, str]) -> None:
        assert self.runners.get(job_id, "absent") == "absent"
        self.runners[job_id] = "alive"
        self.started.append(job_id)

    def runner(self, job_id: str) -> Runner:
        if job_id in self.broken:
            raise RuntimeError("500 Internal Server Error")
        return Runner(self.runners.get(job_id, "absent"), "killed by the test")

    def stop_runner(self, job_id: str) -> None:
        self.stopping.append(job_id)

    def forget_runner(self, job_id: str) -> bool:
        del self.runners[job_id]
        return True

    def placement_groups(self) -> dict[str, list[tuple[str, str]]]:
        return self.groups

    def remove_placement_group(self, group_id: str) -> None:
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

    async def pass_(self, times: int = 1) -> None:
        for _ in range(times):
            await self.dispatcher.reconcile()

    async def validated(self, workers: int = 1, max_restarts: int = 1) -> str:
        """A job whose runner is there and whose data is checked."""
        job_id = await self.submit(workers, max_restarts)
        await self.pass_()
        await self.tell(job_id, DataValidated(data=REPORT))
        return job_id

    async def running(self, workers: int = 1, max_restarts: int = 1) -> str:
        job_id = await self.validated(workers, max_restarts)
        await self.pass_()
        self.cluster.place(job_id, workers)
        await self.tell(job_id, started(1))
        return job_id


def started(attempt: int) -> RunStarted:
    return RunStarted(attempt=attempt, workers=1, nodes=1, device="cpu", total_steps=1, logs="file:///metrics.jsonl")


def read_details(job: FineTuningJob) -> str:
    assert job.error_path is not None
    return Path(job.error_path.removeprefix("file://")).read_text()


def in_world(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            log, cluster = EventLog(MemoryStore()), InMemoryCluster()
            with tempfile.TemporaryDirectory() as storage:
                dispatcher = Dispatcher(log, cluster, Settings(storage=Path(storage)))
                await test(World(log, cluster, dispatcher, Path(storage)))

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_world
async def test_a_submitted_job_gets_one_runner_however_many_passes(world: World) -> None:
    job_id = await world.submit()
    await world.pass_(times=3)
    assert world.cluster.started == [job_id]


@in_world
async def test_the_log_is_asked_for_all_live_jobs_once_and_later_events_are_seen_all_the_same(
    world: World,
) -> None:
    await world.pass_()
    world.log.live_jobs = None  # type: ignore[method-assign, assignment]  # a second call would fail
    first, second = await world.submit(), await world.submit()
    await world.pass_()
    assert world.cluster.started == [first, second]
    await world.tell(first, CancelRequested())
    world.cluster.runners[first] = "stopped"
    await world.pass_(times=2)
    assert (await world.job(first)).status == "cancelled"
    await world.tell(second, DataValidated(data=REPORT))
    await world.pass_()
    assert (await world.job(second)).admitted


@in_world
async def test_only_so_many_jobs_wait_with_a_process_and_the_others_say_why(world: World) -> None:
    ids = [await world.submit() for _ in range(6)]
    await world.pass_()
    assert world.cluster.started == ids[:4]
    assert world.dispatcher.whys()[ids[5]] == "waits for its turn to be validated; 5 jobs ahead"


@in_world
async def test_a_job_says_what_is_being_done_about_it_in_every_state_before_it_runs(world: World) -> None:
    job_id = await world.submit()
    await world.pass_()
    assert world.dispatcher.whys()[job_id] == "its runner is starting"
    await world.pass_()
    assert "its data read, checked and tokenised" in world.dispatcher.whys()[job_id]
    await world.tell(job_id, DataValidated(data=REPORT))
    world.cluster.runners[job_id] = "ended"
    await world.pass_()
    assert world.dispatcher.whys()[job_id] == "its runner ended without an outcome and is being replaced"
    await world.pass_()
    assert world.dispatcher.whys()[job_id] == "its runner is starting"
    await world.pass_()
    assert world.dispatcher.whys()[job_id] == "its resources are free and are being reserved"


@in_world
async def test_a_job_that_was_validated_before_waits_to_be_started_again(world: World) -> None:
    job_id = await world.validated()
    await world.tell(job_id, PauseRequested())
    world.cluster.runners[job_id] = "ended"
    await world.pass_()
    await world.tell(job_id, JobResumed())
    world.cluster.runners = dict.fromkeys([await world.submit() for _ in range(4)], "alive")
    await world.pass_()
    assert world.dispatcher.whys()[job_id] == "waits for its turn to be started again; 4 jobs ahead"


@in_world
async def test_two_jobs_that_need_the_whole_machine_run_one_after_the_other(world: World) -> None:
    first = await world.validated(workers=2)
    second = await world.validated(workers=2)
    await world.pass_()
    world.cluster.place(first, 2)
    await world.tell(first, started(1))
    await world.pass_()
    assert (await world.job(first)).status == "running"
    assert world.dispatcher.whys()[second] == "needs 2 CPUs, 0 free"
    await world.tell(first, JobSucceeded())
    world.cluster.free(first)
    await world.pass_()
    assert (await world.job(second)).admitted


@in_world
async def test_a_cancelled_job_reads_cancelled_only_when_its_runner_and_its_group_are_gone(world: World) -> None:
    job_id = await world.running()
    await world.tell(job_id, CancelRequested())
    await world.pass_()
    assert world.cluster.stopping == [job_id]
    assert (await world.job(job_id)).status == "running"

    world.cluster.runners[job_id] = "stopped"
    await world.pass_()
    assert world.cluster.groups[job_id] == []
    assert (await world.job(job_id)).status == "running"

    await world.pass_()
    assert (await world.job(job_id)).status == "cancelled"


@in_world
async def test_a_job_cancelled_before_it_had_a_runner_never_gets_one(world: World) -> None:
    job_id = await world.submit()
    await world.tell(job_id, CancelRequested())
    await world.pass_(times=2)
    assert (await world.job(job_id)).status == "cancelled"
    assert world.cluster.started == []


@in_world
async def test_a_runner_that_somebody_stopped_means_the_job_was_cancelled(world: World) -> None:
    job_id = await world.validated()
    world.cluster.runners[job_id] = "stopped"
    await world.pass_(times=2)
    assert (await world.job(job_id)).status == "cancelled"


@in_world
async def test_a_runner_that_died_is_started_again_and_the_job_waits_its_turn(world: World) -> None:
    job_id = await world.running()
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    await world.pass_()
    job = await world.job(job_id)
    assert (job.status, job.interruptions) == ("queued", 1)
    assert "killed by the test" in (job.why or "")
    await world.pass_(times=2)
    assert world.cluster.started == [job_id, job_id]
    assert (await world.job(job_id)).admitted


@in_world
async def test_a_job_whose_runner_dies_too_often_fails_and_the_fault_is_not_the_users(world: World) -> None:
    job_id = await world.running(max_restarts=0)
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    await world.pass_()
    job = await world.job(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.fault, job.error.retryable) == ("runner_died", "infrastructure", True)
    assert "killed by the test" in read_details(job)


@in_world
async def test_a_job_can_fail_where_its_directory_cannot_be_written(world: World) -> None:
    job_id = await world.running(max_restarts=0)
    (world.storage / "jobs").write_text("in the way")
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    await world.pass_()
    job = await world.job(job_id)
    assert (job.status, job.error_path) == ("failed", None)


@in_world
async def test_an_outcome_recorded_just_before_the_runner_ended_stands(world: World) -> None:
    job_id = await world.running()
    await world.tell(job_id, JobSucceeded())
    world.cluster.runners[job_id] = "ended"
    await world.pass_(times=2)
    assert (await world.job(job_id)).status == "success"


@in_world
async def test_after_a_restart_of_the_whole_cluster_a_running_job_is_queued_and_started_again(world: World) -> None:
    job_id = await world.running()
    world.cluster.runners.clear()
    world.cluster.free(job_id)
    await world.pass_(times=2)
    job = await world.job(job_id)
    assert job.status == "queued"
    assert world.cluster.started == [job_id, job_id]


@in_world
async def test_a_job_for_which_ray_fails_does_not_keep_the_others_from_what_they_need(world: World) -> None:
    ill, lost = await world.running(), await world.running()
    late = await world.submit()
    await world.pass_()
    world.cluster.broken.add(ill)
    world.cluster.runners[lost] = "ended"
    world.cluster.free(lost)
    await world.pass_(times=2)
    assert (await world.job(lost)).status == "queued"
    assert world.cluster.started == [ill, lost, late, lost]

    world.cluster.broken.clear()
    world.cluster.runners[ill] = "ended"
    world.cluster.free(ill)
    await world.pass_()
    assert (await world.job(ill)).status == "queued"


@in_world
async def test_a_group_left_by_a_dead_runner_is_freed(world: World) -> None:
    job_id = await world.running()
    world.cluster.runners[job_id] = "ended"
    await world.pass_()
    assert world.cluster.groups[job_id] == []


@in_world
async def test_a_group_left_by_an_interrupted_attempt_is_freed_while_the_runner_lives_on(world: World) -> None:
    job_id = await world.running()
    await world.tell(job_id, RunInterrupted(attempt=1, reason="a worker died"))
    await world.pass_()
    assert world.cluster.groups[job_id] == []


@pytest.mark.parametrize("event", [JobSucceeded(), CancelRequested()])
def test_passes_after_the_end_change_nothing(event: Event) -> None:
    @in_world
    async def scenario(world: World) -> None:
        job_id = await world.running()
        await world.tell(job_id, event)
        world.cluster.runners[job_id] = "ended"
        world.cluster.free(job_id)
        await world.pass_(times=2)
        before = await world.job(job_id)
        assert before.over
        await world.pass_(times=3)
        assert await world.job(job_id) == before

    scenario()


def test_the_in_memory_cluster_of_these_tests_answers_every_call_of_the_real_one() -> None:
    from trainers.cluster import Cluster

    calls = {name for name, value in vars(Cluster).items() if callable(value) and not name.startswith("_")}
    assert calls <= set(dir(InMemoryCluster))


@in_world
async def test_a_running_job_that_pauses_is_let_to_its_checkpoint_and_then_holds_nothing(world: World) -> None:
    job_id = await world.running()
    await world.tell(job_id, PauseRequested())
    await world.pass_(times=2)
    assert world.cluster.stopping == []
    assert (await world.job(job_id)).status == "running"

    world.cluster.runners[job_id] = "ended"  # it has written its checkpoint
    await world.pass_(times=3)
    job = await world.job(job_id)
    assert (job.status, job.paused, job.interruptions) == ("queued", True, 0)
    assert world.cluster.groups[job_id] == []
    assert world.cluster.started == [job_id]
    assert job_id not in world.dispatcher.whys()

    await world.tell(job_id, JobResumed())
    await world.pass_(times=2)
    assert world.cluster.started == [job_id, job_id]
    assert (await world.job(job_id)).admitted


@in_world
async def test_paused_jobs_keep_no_runner_from_the_others(world: World) -> None:
    paused = [await world.validated(workers=2) for _ in range(4)]
    for job_id in paused:
        await world.tell(job_id, PauseRequested())
    other = await world.submit()
    await world.pass_()
    assert sorted(world.cluster.stopping) == sorted(paused)
    for job_id in paused:
        world.cluster.runners[job_id] = "stopped"
    await world.pass_(times=2)
    assert [(await world.job(job_id)).why for job_id in paused] == ["paused, until it is resumed"] * 4
    assert world.cluster.started[-1] == other


@in_world
async def test_data_that_is_being_validated_is_finished_before_the_job_pauses(world: World) -> None:
    job_id = await world.submit()
    await world.pass_()
    await world.tell(job_id, PauseRequested())
    await world.pass_(times=2)
    assert world.cluster.stopping == []
    await world.tell(job_id, DataValidated(data=REPORT))
    await world.pass_()
    assert world.cluster.stopping == [job_id]


@in_world
async def test_a_job_resumed_while_its_runner_is_being_stopped_is_not_taken_for_cancelled(world: World) -> None:
    job_id = await world.validated()
    await world.tell(job_id, PauseRequested())
    await world.pass_()
    await world.tell(job_id, JobResumed())
    world.cluster.runners[job_id] = "stopped"
    await world.pass_(times=3)
    assert world.cluster.started == [job_id, job_id]
    assert (await world.job(job_id)).admitted


@in_world
async def test_a_paused_job_can_be_cancelled(world: World) -> None:
    job_id = await world.submit()
    await world.tell(job_id, PauseRequested())
    await world.pass_()
    assert (await world.job(job_id)).paused
    await world.tell(job_id, CancelRequested())
    await world.pass_()
    assert (await world.job(job_id)).status == "cancelled"
    assert world.cluster.started == []


@in_world
async def test_a_job_whose_node_is_drained_moves_at_a_checkpoint_and_no_interruption_is_counted(world: World) -> None:
    job_id = await world.running()
    world.cluster.draining = {job_id}
    await world.pass_(times=2)
    assert (await world.job(job_id)).pausing
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    world.cluster.draining = set()
    await world.pass_(times=3)
    job = await world.job(job_id)
    assert (job.status, job.admitted, job.interruptions) == ("queued", True, 0)
    assert world.cluster.started == [job_id, job_id]


async def passing(world: World) -> None:
    while True:
        await world.pass_()
        await asyncio.sleep(0.01)


@in_world
async def test_a_drain_lets_running_jobs_reach_a_checkpoint_and_starts_none(world: World) -> None:
    running, waiting = await world.running(), await world.validated()
    passes = asyncio.create_task(passing(world))
    drain = asyncio.create_task(world.dispatcher.drain(timeout_s=60))
    asked = await world.job(running)
    while not asked.pausing:
        asked = await world.log.wait(running, asked.version, 5)
    assert not drain.done()
    world.cluster.runners[running] = "ended"
    world.cluster.free(running)
    assert await drain == []
    late = await world.submit()
    await world.dispatcher.reconcile()
    passes.cancel()
    assert world.cluster.started == [running, waiting]
    assert not (await world.job(waiting)).admitted
    assert "being shut down" in world.dispatcher.whys()[late]

    after = Dispatcher(world.log, world.cluster, Settings())  # type: ignore[arg-type]
    for _ in range(3):
        await after.reconcile()
    assert world.cluster.started == [running, waiting, running, late]
    assert (await world.job(running)).admitted


@in_world
async def test_a_drain_names_the_jobs_that_did_not_stop_in_time(world: World) -> None:
    job_id = await world.running()
    passes = asyncio.create_task(passing(world))
    assert await world.dispatcher.drain(timeout_s=0.5) == [job_id]
    passes.cancel()


@in_world
async def test_a_job_that_was_killed_before_it_reached_its_checkpoint_goes_on_all_the_same(world: World) -> None:
    """The whole service went down while it was being drained."""
    job_id = await world.running(max_restarts=0)
    await world.tell(job_id, PauseRequested(by="shutdown"))
    del world.cluster.runners[job_id]
    world.cluster.free(job_id)
    after = Dispatcher(world.log, world.cluster, Settings())  # type: ignore[arg-type]
    for _ in range(3):
        await after.reconcile()
    job = await world.job(job_id)
    assert (job.status, job.admitted, job.interruptions) == ("queued", True, 0)

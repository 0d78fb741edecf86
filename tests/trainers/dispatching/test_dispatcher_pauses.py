"""The dispatcher and jobs that pause: because their user says so, their node is drained, or the service is shut
down."""

import asyncio

import pytest

from events.facts import CancelRequested, JobResumed, PauseRequested
from events.log import LiveJobs, LogUnavailable
from tests.events.facts_of_a_job import VALIDATED, started
from tests.trainers.world import World, in_world


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
    await world.tell(job_id, VALIDATED)
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


@in_world
async def test_only_a_pause_of_its_user_s_gives_a_running_job_s_place_to_a_younger_one(world: World) -> None:
    older, younger = await world.running(workers=2), await world.submit(workers=2)
    await world.pass_()
    await world.tell(younger, VALIDATED)
    for pause, admitted in ((PauseRequested(by="node_drain"), False), (PauseRequested(), True)):
        await world.tell(older, pause)
        world.cluster.runners[older] = "ended"
        world.cluster.remembered = {older}
        world.cluster.free(older)
        await world.pass_(times=2)
        assert (await world.job(younger)).admitted == admitted


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
        asked = await world.log.wait(running, asked.version, 60)
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

    after = world.another_dispatcher()
    for _ in range(3):
        await after.reconcile()
    assert world.cluster.started == [running, waiting, running, late]
    assert (await world.job(running)).admitted


@in_world
async def test_a_drain_starts_no_job_that_waits_inside_ray_for_what_a_running_one_frees(world: World) -> None:
    running, admitted = await world.running(workers=2), await world.validated(workers=2)
    await world.pass_()
    assert (await world.job(admitted)).admitted
    world.cluster.groups[admitted] = [("pending", "PENDING")]
    passes = asyncio.create_task(passing(world))
    drain = asyncio.create_task(world.dispatcher.drain(timeout_s=60))
    asked = await world.job(admitted)
    while not asked.pausing:
        asked = await world.log.wait(admitted, asked.version, 60)
    world.cluster.runners[running] = "ended"
    world.cluster.free(running)
    # As long as its runner is there, Ray may give its workers their place.
    assert await world.dispatcher.drain(timeout_s=0.5) == [admitted]
    assert admitted in world.cluster.stopping
    world.cluster.runners[admitted] = "stopped"
    assert await drain == []
    while (job := await world.job(admitted)).pausing:
        await world.log.wait(admitted, job.version, 60)
    passes.cancel()
    assert world.cluster.groups[admitted] == []
    assert (job.status, job.admitted, job.interruptions) == ("queued", False, 0)

    after = world.another_dispatcher()
    for _ in range(3):
        await after.reconcile()
    assert [(await world.job(job_id)).admitted for job_id in (running, admitted)] == [True, False]


@in_world
async def test_a_job_that_was_admitted_asks_again_after_a_restart_of_the_cluster(world: World) -> None:
    older, younger = await world.running(workers=2), await world.submit(workers=2)
    await world.pass_()
    await world.tell(younger, VALIDATED)
    await world.pass_()
    assert (await world.job(younger)).admitted
    world.cluster.runners.clear()
    world.cluster.free(older)
    after = world.another_dispatcher()
    for _ in range(3):
        await after.reconcile()
        assert not (await world.job(younger)).admitted
    assert (await world.job(older)).admitted
    assert world.cluster.started == [older, younger, older, younger]
    world.cluster.place(older, 2)
    await world.tell(older, started(2))
    await after.reconcile()
    job = await world.job(younger)
    assert (job.admitted, job.interruptions) == (True, 0)


@in_world
async def test_a_drain_names_the_jobs_that_did_not_stop_in_time(world: World) -> None:
    job_id = await world.running()
    passes = asyncio.create_task(passing(world))
    assert await world.dispatcher.drain(timeout_s=0.5) == [job_id]
    passes.cancel()


@in_world
async def test_a_drain_that_can_not_know_what_runs_does_not_say_that_nothing_does(world: World) -> None:
    """A dispatcher that was just restarted, and whose log is away."""
    await world.running()

    async def away() -> LiveJobs:
        raise LogUnavailable("the event log does not answer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.log, "live_jobs", away)
        after = world.another_dispatcher()
        passes = asyncio.create_task(after.run())
        with pytest.raises(LogUnavailable, match="nobody knows what runs: the event log does not answer"):
            await after.drain(timeout_s=0.5)
        passes.cancel()


@in_world
async def test_a_drain_that_has_no_time_to_look_says_so(world: World) -> None:
    with pytest.raises(LogUnavailable, match=r"^nobody knows what runs: a whole look takes longer than 0\.1 s$"):
        await world.dispatcher.drain(timeout_s=0.1)


@in_world
async def test_a_job_that_was_killed_before_it_reached_its_checkpoint_goes_on_all_the_same(world: World) -> None:
    """The whole service went down while it was being drained."""
    job_id = await world.running(max_restarts=0)
    await world.tell(job_id, PauseRequested(by="shutdown"))
    del world.cluster.runners[job_id]
    world.cluster.free(job_id)
    after = world.another_dispatcher()
    for _ in range(3):
        await after.reconcile()
    job = await world.job(job_id)
    assert (job.status, job.admitted, job.interruptions) == ("queued", True, 0)


@in_world
async def test_a_drain_waits_for_a_job_of_which_ray_does_not_say_how_its_runner_is(world: World) -> None:
    job_id = await world.running()
    world.cluster.broken = {job_id}
    passes = asyncio.create_task(passing(world))
    assert await world.dispatcher.drain(timeout_s=0.5) == [job_id]
    passes.cancel()
    assert (await world.job(job_id)).pausing

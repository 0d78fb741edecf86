"""The last lines of a job's log when its own processes are gone."""

import asyncio
from collections.abc import Sequence

import pytest

from events.facts import (
    CancelRequested,
    CheckpointSaved,
    Event,
    JobFailed,
    MetricsRecorded,
    PauseRequested,
)
from events.job import FineTuningJob
from tests.events.facts_of_a_job import step
from tests.trainers.world import World, in_world
from trainers.dispatching import dispatcher


async def trained(world: World, job_id: str, *events: Event) -> str:
    """Three steps, and a checkpoint after the second; what else happened then; its runner is gone."""
    saved = CheckpointSaved(attempt=1, step=2, epoch=1, uri="file:///storage/a%20job/step-2")
    await world.tell(job_id, MetricsRecorded(attempt=1, steps=[step(1), step(2)]), saved)
    await world.tell(job_id, MetricsRecorded(attempt=1, steps=[step(3)]), *events)
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    return job_id


LEFT = "(its last checkpoint: /storage/a job/step-2)"


@in_world
async def test_a_job_that_was_cancelled_says_how_far_it_was_and_what_is_left(world: World) -> None:
    running = await trained(world, await world.running(), CancelRequested())
    waiting = await world.validated()
    without = await world.running()
    world.cluster.runners[without] = "stopped"  # `ray job stop`
    world.cluster.free(without)
    await world.tell(waiting, CancelRequested())
    world.cluster.runners[waiting] = "stopped"
    await world.pass_(times=3)
    assert await world.lines(running) == [f"cancelled after step 3 of 100 {LEFT}"]
    assert await world.lines(waiting) == ["cancelled before its training began"]
    assert await world.lines(without) == ["cancelled after step 0 of 100 (it has no checkpoint)"]
    assert [(await world.job(job_id)).status for job_id in (running, waiting, without)] == ["cancelled"] * 3


@in_world
async def test_a_job_that_was_paused_says_whether_somebody_has_to_resume_it(world: World) -> None:
    by_user = await trained(world, await world.running(), PauseRequested())
    by_shutdown = await trained(world, await world.running(), PauseRequested(by="shutdown"))
    await world.pass_(times=2)
    assert await world.lines(by_user) == [f"stopped after step 3 of 100 {LEFT}; it goes on once it is resumed"]
    assert await world.lines(by_shutdown) == [f"stopped after step 3 of 100 {LEFT}; it goes on by itself"]


@in_world
async def test_each_loss_of_a_runner_is_told_once_and_so_is_the_one_too_many(world: World) -> None:
    job_id = await trained(world, await world.running(max_restarts=0))
    world.cluster.told = "Job entrypoint command failed with exit code -9, last available logs: x"
    await world.pass_(times=3)
    interrupted, failed = await world.lines(job_id)
    lost = "its runner ended without an outcome: it was killed by signal 9"
    told = "that was interruption 1, and --max-restarts is 0"
    assert interrupted == f"interrupted after step 3 of 100 {LEFT}: {lost}; {told}"
    assert failed.startswith(f"job failed (runner_died, fault of the infrastructure): {lost}; it was restarted 0 times")
    assert (await world.job(job_id)).interruptions == 1


@in_world
async def test_a_loss_whose_runner_ray_remembers_for_a_while_is_told_once(world: World) -> None:
    job_id = await trained(world, await world.running())
    world.cluster.remembered = {job_id}
    await world.pass_(times=3)
    await world.another_dispatcher().reconcile()
    assert len(await world.lines(job_id)) == 1


@in_world
async def test_a_line_about_an_end_that_the_event_log_then_refuses_is_corrected(world: World) -> None:
    """The user cancels the job just as it is about to fail."""
    job_id = await trained(world, await world.running(max_restarts=0))
    append = world.log.append

    async def cancelled_before(of: str, events: list[Event], ids: list[str]) -> FineTuningJob:
        if isinstance(events[0], JobFailed):
            await append(of, [CancelRequested()], ["cancelled"])
        return await append(of, events, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.log, "append", cancelled_before)
        await world.pass_()
    await world.pass_(times=2)
    assert (await world.job(job_id)).status == "cancelled"
    _, failed, corrected, cancelled = await world.lines(job_id)
    assert failed.startswith("job failed (runner_died")
    assert corrected == f"disregard the line above: job {job_id} is being cancelled"
    assert cancelled.startswith("cancelled after step 2 of 100")


@pytest.mark.parametrize("reason", ["No space left on device", "no answer in time"])
def test_a_job_ends_though_its_log_takes_no_line_and_the_dispatcher_s_has_it_with_the_reason(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def append(job_id: str, source: str, seq: int, lines: Sequence[tuple[str, str]]) -> int:
        if reason == "no answer in time":
            await asyncio.Event().wait()
        raise OSError(reason)

    @in_world
    async def test(world: World) -> None:
        job_id = await world.validated()
        await world.tell(job_id, CancelRequested())
        world.cluster.runners[job_id] = "stopped"
        monkeypatch.setattr(world.dispatcher._lines, "append", append)
        monkeypatch.setattr(dispatcher, "SAY_S", 0.1)
        await world.pass_(times=2)
        assert (await world.job(job_id)).status == "cancelled"
        assert caplog.messages[-1] == f"{job_id}: not in its log: cancelled before its training began ({reason})"

    test()

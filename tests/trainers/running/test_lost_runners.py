"""A runner is lost while its job is live: the dispatcher starts another one, or fails the job."""

from pathlib import Path

import pytest

from events.facts import Event, JobResumed, PauseRequested, RunInterrupted
from events.job import FineTuningJob
from tests.trainers.world import World, in_world
from trainers.dispatching.cluster import RunnerState

_OUTPUT = ", last available logs (truncated to 20,000 chars):\nattempt 1: starting\n"


def read_details(job: FineTuningJob) -> str:
    assert job.error_path is not None
    return Path(job.error_path.removeprefix("file://")).read_text()


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


@pytest.mark.parametrize(
    ("told", "gist"),
    [
        (f"Job entrypoint command failed with exit code -9{_OUTPUT}step 19/45 | loss 4.6", "it was killed by signal 9"),
        ("Job entrypoint command failed with exit code -15. No logs available.", "it was killed by signal 15"),
        (
            f"Job entrypoint command failed with exit code 1{_OUTPUT}ValueError: no.",
            "Job entrypoint command failed with exit code 1: ValueError: no",
        ),
        ("Unexpected error occurred: no node.", "Unexpected error occurred: no node"),
        ("", "no message from Ray"),
    ],
)
def test_the_end_of_a_runner_is_told_in_one_clause_and_not_by_what_it_printed_before_it_was_killed(
    told: str, gist: str
) -> None:
    @in_world
    async def scenario(world: World) -> None:
        job_id = await world.running()
        world.cluster.told = told
        world.cluster.runners[job_id] = "ended"
        world.cluster.free(job_id)
        await world.pass_()
        why = f"interrupted: its runner ended without an outcome: {gist}, waiting to resume"
        assert (await world.job(job_id)).why == why

    scenario()


@in_world
async def test_runners_that_die_while_their_job_waits_to_resume_are_counted_like_any_other(world: World) -> None:
    job_id = await world.running(max_restarts=3)
    await world.tell(job_id, RunInterrupted(attempt=1, reason="a worker died"))
    world.cluster.free(job_id)
    while not (job := await world.job(job_id)).over and len(world.cluster.started) < 9:
        assert not job.admitted
        world.cluster.runners[job_id] = "ended"
        await world.pass_(times=2)
    assert job.error is not None
    assert (job.error.code, len(world.cluster.started)) == ("runner_died", 3)
    assert "restarted 3 times" in job.error.message


@pytest.mark.parametrize("waiting", [False, True], ids=["running", "waiting to resume"])
def test_the_loss_of_a_runner_is_counted_at_once_and_only_once_whatever_becomes_of_the_dispatcher(
    waiting: bool,
) -> None:
    """Ray goes on showing the runner for a while, and a runner that lives on without its supervisor is not to share
    its tenure with the next one."""

    @in_world
    async def scenario(world: World) -> None:
        job_id = await world.running(max_restarts=2)
        if waiting:
            await world.tell(job_id, RunInterrupted(attempt=1, reason="a worker died"))
        world.cluster.runners[job_id] = "ended"
        world.cluster.remembered = {job_id}
        world.cluster.free(job_id)
        for _ in range(3):
            await world.another_dispatcher().reconcile()
            job = await world.job(job_id)
            assert (job.status, job.interruptions) == ("queued", 1 + waiting)
        assert world.cluster.started == [job_id]
        world.cluster.remembered = set()
        await world.pass_(times=2)
        assert world.cluster.started == [job_id, job_id]
        assert (await world.job(job_id)).interruptions == 1 + waiting

    scenario()


@in_world
async def test_the_error_file_has_the_reason_also_where_ray_knows_nothing_about_the_runner(world: World) -> None:
    job_id = await world.running(max_restarts=0)
    world.cluster.runners.clear()
    world.cluster.free(job_id)
    await world.pass_()
    job = await world.job(job_id)
    assert job.status == "failed"
    assert read_details(job) == "the cluster was restarted while it ran\n"


@pytest.mark.parametrize("then", ["ended", "absent"])
def test_a_job_lost_too_often_does_not_run_once_more_though_everything_went_down_before_it_could_fail(
    then: RunnerState,
) -> None:
    @in_world
    async def scenario(world: World) -> None:
        job_id = await world.running(max_restarts=0)
        lost: list[Event] = [RunInterrupted(attempt=1, reason="the cluster was restarted while it ran")]
        ids = [f"{job_id}-runner-1-lost" if then == "ended" else f"{job_id}-attempt-1-lost"]
        await world.log.append(job_id, lost, ids)
        world.cluster.runners = {job_id: then} if then != "absent" else {}
        world.cluster.free(job_id)
        await world.pass_(times=2)
        job = await world.job(job_id)
        assert (job.status, job.interruptions) == ("failed", 1)
        assert world.cluster.started == [job_id]

    scenario()


@in_world
async def test_a_paused_job_that_was_lost_too_often_stays_paused(world: World) -> None:
    job_id = await world.running(max_restarts=0)
    await world.tell(job_id, RunInterrupted(attempt=1, reason="lost"), PauseRequested())
    world.cluster.runners.clear()
    world.cluster.free(job_id)
    await world.pass_(times=2)
    job = await world.job(job_id)
    assert job.paused
    await world.pass_()
    assert await world.job(job_id) == job
    await world.tell(job_id, JobResumed())
    await world.pass_()
    assert (await world.job(job_id)).status == "failed"


@in_world
async def test_a_job_can_fail_where_its_directory_cannot_be_written(world: World) -> None:
    job_id = await world.running(max_restarts=0)
    (world.storage / "jobs").write_text("in the way")
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    await world.pass_()
    job = await world.job(job_id)
    assert (job.status, job.error_path) == ("failed", None)

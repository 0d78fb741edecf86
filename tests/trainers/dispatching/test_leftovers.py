"""What goes with a job that is over, and what stays until it is certain that it is."""

import pytest

from events.facts import JobSucceeded
from events.job import FineTuningJob
from events.log import LogUnavailable
from tests.trainers.world import World, in_world
from trainers.planning.plan import COMPILED, REFERENCE
from trainers.settings import Settings


@in_world
async def test_with_a_cancelled_job_goes_what_only_its_own_runs_could_use(world: World) -> None:
    job_id = await world.running()
    job_dir = Settings(storage=world.storage).job_dir(job_id)
    checkpoints = job_dir / "checkpoints"
    for name in ("step-00000008/merged", "step-00000008/training_state", ".step-00000012.draft/merged"):
        (checkpoints / name).mkdir(parents=True)
    for made in (job_dir / COMPILED, job_dir / "data" / "train", job_dir / "data" / ".valid-killed-while-written"):
        made.mkdir(parents=True)
    (job_dir / REFERENCE).touch()
    world.cluster.runners[job_id] = "stopped"
    await world.pass_(times=2)
    assert (await world.job(job_id)).status == "cancelled"
    assert {path.relative_to(job_dir).as_posix() for path in job_dir.rglob("*")} == {
        "log.ndjson",
        "checkpoints",
        "checkpoints/step-00000008",
        "checkpoints/step-00000008/merged",
        "data",
    }


@in_world
async def test_what_a_runner_was_killed_before_it_could_delete_goes_all_the_same(world: World) -> None:
    job_id = await world.running()
    state = Settings(storage=world.storage).job_dir(job_id) / "checkpoints" / "step-00000008" / "training_state"
    state.mkdir(parents=True)
    await world.pass_()
    await world.tell(job_id, JobSucceeded())
    await world.pass_(times=2)
    assert state.is_dir()  # it may be about to delete it
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    await world.pass_(times=2)
    assert not state.exists()
    assert state.parent.is_dir()


@in_world
async def test_what_a_job_would_go_on_from_stays_until_it_is_certain_that_it_will_not(world: World) -> None:
    """Its runner was stopped by hand, and the log is away as that is to be recorded."""
    job_id = await world.running()
    state = Settings(storage=world.storage).job_dir(job_id) / "checkpoints" / "step-00000008" / "training_state"
    state.mkdir(parents=True)
    world.cluster.runners[job_id] = "stopped"
    world.cluster.free(job_id)

    async def away(*_: object, **__: object) -> FineTuningJob:
        raise LogUnavailable("no answer in time")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.log, "append", away)
        with pytest.raises(LogUnavailable):
            await world.pass_()
    assert state.is_dir()
    await world.pass_()
    assert (await world.job(job_id)).status == "cancelled"
    assert not state.exists()

"""Which files are deleted with a job that is over, and which stay until it is certain that it is."""

from pathlib import Path

import pytest

from events.facts import CancelRequested, CheckpointSaved, Event, JobSucceeded
from events.job import FineTuningJob
from events.log import LogUnavailable
from tests.trainers.world import World, in_world
from trainers.planning.plan import COMPILED, REFERENCE
from trainers.settings import Settings


def saved(checkpoint: Path) -> CheckpointSaved:
    return CheckpointSaved(attempt=1, step=int(checkpoint.name[5:]), epoch=1, uri=checkpoint.as_uri(), metrics={})


@in_world
async def test_files_that_only_its_own_runs_could_use_are_deleted_with_a_cancelled_job(world: World) -> None:
    job_id = await world.running()
    job_dir = Settings(storage=world.storage).job_dir(job_id)
    checkpoints = job_dir / "checkpoints"
    for name in ("step-00000008/merged", "step-00000008/training_state", ".step-00000012.draft/merged"):
        (checkpoints / name).mkdir(parents=True)
    for made in (job_dir / COMPILED, job_dir / "data" / "train", job_dir / "data" / ".valid-killed-while-written"):
        made.mkdir(parents=True)
    (job_dir / REFERENCE).touch()
    await world.tell(job_id, saved(checkpoints / "step-00000008"))
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
async def test_files_that_a_runner_was_killed_before_deleting_are_deleted_all_the_same(world: World) -> None:
    job_id = await world.running()
    state = Settings(storage=world.storage).job_dir(job_id) / "checkpoints" / "step-00000008" / "training_state"
    state.mkdir(parents=True)
    await world.pass_()
    await world.tell(job_id, saved(state.parent), JobSucceeded())
    await world.pass_(times=2)
    assert state.is_dir()  # it may be about to delete it
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    await world.pass_(times=2)
    assert not state.exists()
    assert state.parent.is_dir()


@in_world
async def test_the_training_state_stays_until_it_is_recorded_that_the_job_will_not_go_on(world: World) -> None:
    """Its runner was stopped by hand, and the log can't be reached when that is to be recorded."""
    job_id = await world.running()
    state = Settings(storage=world.storage).job_dir(job_id) / "checkpoints" / "step-00000008" / "training_state"
    state.mkdir(parents=True)
    await world.tell(job_id, saved(state.parent))
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


@pytest.mark.parametrize("then", ["cancelled by the dispatcher", "ended by its runner"])
def test_a_checkpoint_that_was_written_but_not_recorded_is_deleted_once_the_job_is_over(then: str) -> None:
    @in_world
    async def scenario(world: World) -> None:
        job_id = await world.running()
        checkpoints = Settings(storage=world.storage).job_dir(job_id) / "checkpoints"
        recorded, unrecorded = checkpoints / "step-00000008", checkpoints / "step-00000016"
        for checkpoint in (recorded, unrecorded):
            (checkpoint / "training_state").mkdir(parents=True)
            (checkpoint / "merged").mkdir()
        outcome: Event = CancelRequested() if then == "cancelled by the dispatcher" else JobSucceeded()
        await world.tell(job_id, saved(recorded), outcome)
        world.cluster.runners[job_id] = "ended"
        world.cluster.free(job_id)
        await world.pass_(times=2)
        assert (await world.job(job_id)).over
        assert sorted(path.relative_to(checkpoints).as_posix() for path in checkpoints.rglob("*")) == [
            "step-00000008",
            "step-00000008/merged",
        ]

    scenario()


@in_world
async def test_a_checkpoint_that_is_recorded_while_its_job_is_being_cancelled_stays(world: World) -> None:
    """By a worker that Ray lost sight of, after the dispatcher has read the job for the last time."""
    job_id = await world.running()
    checkpoint = Settings(storage=world.storage).job_dir(job_id) / "checkpoints" / "step-00000008"
    (checkpoint / "training_state").mkdir(parents=True)
    await world.tell(job_id, CancelRequested())
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    append = world.log.append

    async def recorded_before(of: str, events: list[Event], ids: list[str]) -> FineTuningJob:
        await append(of, [saved(checkpoint)], ["recorded"])
        return await append(of, events, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.log, "append", recorded_before)
        await world.pass_()
    job = await world.job(job_id)
    assert (job.status, job.checkpoints) == ("cancelled", [checkpoint.as_uri()])
    assert list(checkpoint.iterdir()) == []


@in_world
async def test_checkpoints_that_a_restored_event_log_no_longer_knows_stay(world: World) -> None:
    """A job that had ended before the restore is live again then, and may be cancelled."""
    job_id = await world.running()
    checkpoints = Settings(storage=world.storage).job_dir(job_id) / "checkpoints"
    (checkpoints / "step-00000008" / "merged").mkdir(parents=True)
    await world.tell(job_id, CancelRequested())
    world.cluster.runners[job_id] = "ended"
    world.cluster.free(job_id)
    await world.pass_(times=2)
    assert (await world.job(job_id)).status == "cancelled"
    assert (checkpoints / "step-00000008" / "merged").is_dir()

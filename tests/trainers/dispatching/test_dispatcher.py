"""The dispatcher on a cluster in memory: whatever the log and the cluster say, its passes make them match."""

from logging.handlers import BufferingHandler

import pytest

from events.decide import Refused
from events.facts import CancelRequested, Event, JobResumed, JobSucceeded, PauseRequested, RunInterrupted
from events.store import Damage
from tests.events.facts_of_a_job import VALIDATED, started
from tests.trainers.world import InMemoryCluster, World, in_world
from trainers.dispatching import dispatcher
from trainers.dispatching.cluster import Cluster
from trainers.dispatching.dispatcher import PATIENCE


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
    pytest.MonkeyPatch().setattr(world.log, "live_jobs", None)  # a second call would fail
    first, second = await world.submit(), await world.submit()
    await world.pass_()
    assert world.cluster.started == [first, second]
    await world.tell(first, CancelRequested())
    world.cluster.runners[first] = "stopped"
    await world.pass_(times=2)
    assert (await world.job(first)).status == "cancelled"
    await world.tell(second, VALIDATED)
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
    await world.tell(job_id, VALIDATED)
    world.cluster.runners[job_id] = "ended"
    await world.pass_()
    assert world.dispatcher.whys()[job_id] == "its runner ended without an outcome and is being replaced"
    await world.pass_()
    assert world.dispatcher.whys()[job_id] == "its runner is starting"
    await world.pass_()
    assert world.dispatcher.whys()[job_id] == "its resources are free and are being reserved"


@in_world
async def test_a_job_that_was_validated_before_waits_to_be_started_again(world: World) -> None:
    older = [await world.submit() for _ in range(4)]
    job_id = await world.submit()
    world.cluster.runners = dict.fromkeys([*older[1:], job_id], "alive")
    await world.tell(job_id, VALIDATED, PauseRequested())
    world.cluster.runners[job_id] = "ended"
    await world.pass_()
    await world.tell(job_id, JobResumed())
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
async def test_a_running_job_keeps_its_place_before_a_younger_one_when_everything_is_started_again(
    world: World,
) -> None:
    older = await world.running(workers=2)
    younger = [await world.submit(workers=2) for _ in range(5)]
    await world.pass_()
    for job_id in younger[:3]:
        await world.tell(job_id, VALIDATED)
    world.cluster.runners.clear()
    world.cluster.free(older)
    started = len(world.cluster.started)
    after = world.another_dispatcher()
    for _ in range(4):
        await after.reconcile()
    assert world.cluster.started[started:] == [*younger[:3], older]
    assert (await world.job(older)).admitted
    assert [(await world.job(job_id)).admitted for job_id in younger[:3]] == [False] * 3
    assert after.whys()[younger[0]] == "needs 2 CPUs, 0 free"
    world.cluster.place(older, 2)
    await after.reconcile()
    assert [(await world.job(job_id)).admitted for job_id in younger[:3]] == [True, False, False]


@in_world
async def test_a_job_s_resources_are_kept_for_it_while_its_runner_is_replaced(world: World) -> None:
    older = await world.running(workers=2)
    younger = await world.submit(workers=2)
    await world.pass_()
    await world.tell(younger, VALIDATED)
    world.cluster.runners[older] = "ended"
    world.cluster.remembered = {older}
    world.cluster.free(older)
    await world.pass_(times=3)
    assert not (await world.job(younger)).admitted
    assert world.dispatcher.whys()[younger] == "needs 2 CPUs, 0 free; 1 job ahead"
    world.cluster.remembered = set()
    await world.pass_(times=3)
    assert [(await world.job(job_id)).admitted for job_id in (older, younger)] == [True, False]


@in_world
async def test_a_job_s_resources_are_kept_for_it_even_if_as_many_younger_runners_wait_as_may(world: World) -> None:
    older = await world.running(workers=2)
    waiting = [await world.submit(workers=2) for _ in range(4)]
    await world.pass_()
    await world.tell(waiting[0], VALIDATED)
    world.cluster.runners[older] = "ended"
    world.cluster.free(older)
    await world.pass_(times=3)
    assert world.cluster.started == [older, *waiting, older]
    assert [(await world.job(job_id)).admitted for job_id in (older, waiting[0])] == [True, False]


@in_world
async def test_older_jobs_that_come_back_one_by_one_at_most_double_the_runners_that_wait(world: World) -> None:
    older = [await world.submit() for _ in range(9)]
    for job_id in older:
        await world.tell(job_id, PauseRequested())
    await world.pass_()
    [await world.submit() for _ in range(4)]
    for job_id in reversed(older):
        await world.pass_()
        await world.tell(job_id, JobResumed())
    await world.pass_(times=2)
    assert world.cluster.started[4:] == older[:-5:-1]


@in_world
async def test_a_job_that_can_have_no_runner_for_now_keeps_nobody_waiting(world: World) -> None:
    being_validated = [await world.submit(workers=2) for _ in range(4)]
    await world.pass_()
    late, later = await world.submit(workers=2), await world.submit(workers=2)
    for job_id in (late, later):
        await world.tell(job_id, VALIDATED)  # before the service was started again
    world.cluster.runners[later] = "alive"
    await world.pass_()
    assert world.dispatcher.whys()[late] == "waits for its turn to be started again; 4 jobs ahead"
    assert world.cluster.started == being_validated
    assert (await world.job(later)).admitted


@in_world
async def test_a_job_whose_runner_fails_to_start_keeps_nobody_waiting_for_ever(world: World) -> None:
    older, younger = await world.submit(workers=2), await world.submit(workers=2)
    world.cluster.unstartable = {older}
    await world.tell(older, VALIDATED)
    await world.pass_()
    await world.tell(younger, VALIDATED)
    await world.pass_(times=PATIENCE)
    assert (await world.job(younger)).admitted


@pytest.mark.parametrize("fails", ["to say how its runner is", "to forget its runner", "to start its runner"])
def test_a_job_for_which_ray_fails_keeps_its_place_for_some_passes_and_then_keeps_nobody_waiting(fails: str) -> None:
    @in_world
    async def scenario(world: World) -> None:
        running = await world.running()
        older, younger = await world.validated(workers=2), await world.validated(workers=2)
        await world.pass_()
        assert world.dispatcher.whys()[younger] == "needs 2 CPUs, 1 free; 1 job ahead"
        if fails == "to say how its runner is":
            failing = world.cluster.broken
        else:
            world.cluster.runners[older] = "ended"
            failing = world.cluster.unforgettable if fails == "to forget its runner" else world.cluster.unstartable
        failing.add(older)
        await world.pass_(times=PATIENCE)
        assert not (await world.job(younger)).admitted
        assert world.dispatcher.whys()[younger] == "needs 2 CPUs, 1 free; 1 job ahead"
        await world.pass_(times=2)
        assert (await world.job(younger)).admitted
        assert (await world.job(running)).status == "running"

    scenario()


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
async def test_a_job_whose_history_turns_out_to_be_damaged_keeps_nothing_from_the_others(world: World) -> None:
    damaged = [await world.validated(workers=2) for _ in range(4)]
    for position, job_id in enumerate(damaged):
        world.log._store.damage[position] = Damage(position, (job_id,), "a flipped bit")
        world.cluster.runners[job_id] = "ended"  # it could not go on, either
    younger = await world.submit(workers=2)
    await world.pass_(times=2)
    await world.tell(younger, VALIDATED)
    await world.pass_()
    assert (await world.job(younger)).admitted
    for job_id in damaged:
        with pytest.raises(Refused, match="a flipped bit"):
            await world.job(job_id)
    assert not world.dispatcher.whys().keys() & set(damaged)


@in_world
async def test_a_job_whose_dead_runner_can_not_be_dealt_with_keeps_no_runner_from_the_others(world: World) -> None:
    stuck = [await world.validated(workers=2) for _ in range(4)]
    for job_id in stuck:
        world.cluster.runners[job_id] = "ended"
    world.cluster.unforgettable = set(stuck)
    younger = await world.submit(workers=2)
    await world.pass_(times=PATIENCE + 1)
    await world.tell(younger, VALIDATED)
    await world.pass_()
    assert (await world.job(younger)).admitted


@in_world
async def test_jobs_whose_runners_fail_to_start_keep_no_runner_from_the_others(world: World) -> None:
    world.cluster.unstartable = {await world.submit() for _ in range(4)}
    younger = await world.submit()
    await world.pass_(times=PATIENCE + 1)
    assert world.cluster.started == [younger]


@in_world
async def test_where_ray_starts_no_runner_at_all_only_so_many_jobs_are_tried_in_each_pass(world: World) -> None:
    ids = [await world.submit() for _ in range(30)]
    world.cluster.unstartable = set(ids)
    for _ in range(4 * PATIENCE):
        world.cluster.tried.clear()
        await world.pass_()
        assert len(world.cluster.tried) <= 8
    world.cluster.unstartable = set()
    await world.pass_()
    assert world.cluster.started == ids[:4]


@in_world
async def test_a_group_that_can_not_be_freed_keeps_no_runner_from_the_others(world: World) -> None:
    job_id = await world.running()
    await world.tell(job_id, RunInterrupted(attempt=1, reason="a worker died"))
    world.cluster.unremovable = {f"group-of-{job_id}"}
    other = await world.submit()
    await world.pass_()
    assert world.cluster.started == [job_id, other]


def test_a_runner_that_hangs_though_its_job_is_over_is_stopped_and_what_it_held_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @in_world
    async def test(world: World) -> None:
        job_id = await world.running()
        await world.tell(job_id, JobSucceeded())
        await world.pass_(times=3)
        assert world.cluster.stopping == []  # it may be about to end
        monkeypatch.setattr(dispatcher, "LEAVING_S", 0.0)
        await world.pass_()
        assert world.cluster.stopping == [job_id]
        assert job_id in world.cluster.groups
        world.cluster.runners[job_id] = "stopped"
        await world.pass_(times=2)
        assert (world.cluster.stopping, world.cluster.groups[job_id]) == ([job_id], [])

    test()


@in_world
async def test_placement_groups_of_others_are_left_alone_and_nothing_is_said_of_them(world: World) -> None:
    world.cluster.groups = {"": [("nameless", "CREATED")], "somebody-else": [("theirs", "CREATED")]}
    said = BufferingHandler(100)
    dispatcher.logger.addHandler(said)
    try:
        await world.pass_(times=2)
    finally:
        dispatcher.logger.removeHandler(said)
    assert said.buffer == []
    assert len(world.cluster.groups) == 2


def test_a_runner_that_outlived_its_job_is_stopped_by_a_dispatcher_that_was_not_there_when_it_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @in_world
    async def test(world: World) -> None:
        job_id = await world.running()
        await world.tell(job_id, JobSucceeded())
        after = world.another_dispatcher()
        await after.reconcile()
        assert world.cluster.stopping == []
        monkeypatch.setattr(dispatcher, "LEAVING_S", 0.0)
        await after.reconcile()
        assert world.cluster.stopping == [job_id]

    test()


def test_ray_is_asked_no_more_about_a_runner_that_ended_with_its_job(caplog: pytest.LogCaptureFixture) -> None:
    @in_world
    async def test(world: World) -> None:
        job_id = await world.running()
        await world.tell(job_id, JobSucceeded())
        world.cluster.runners[job_id] = "ended"
        world.cluster.free(job_id)
        await world.pass_()
        world.cluster.broken = {job_id}  # it would fail, and be logged
        await world.pass_()
        assert caplog.messages == []

    test()


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
    calls = {name for name, value in vars(Cluster).items() if callable(value) and not name.startswith("_")}
    assert calls <= vars(InMemoryCluster).keys()

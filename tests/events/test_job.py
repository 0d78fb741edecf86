"""The fold: what a job reads like after its events."""

import json
import pickle
import warnings
from datetime import timedelta

import pytest

from events.codec import AnyEvent, UnknownEvent
from events.facts import CheckpointsDeleted, PauseRequested
from events.job import FineTuningJob, fold
from tests.events.facts_of_a_job import (
    ADMITTED,
    CANCEL,
    CANCELLED,
    CONFIG,
    DRAIN,
    ERROR,
    FAILED,
    PAUSE,
    QUEUED,
    REJECTED,
    RESOURCES,
    RESUME,
    RUNNING,
    START,
    SUBMITTED,
    SUCCEEDED,
    VALIDATED,
    given,
    interrupted,
    measured,
    paused,
    saved,
    started,
    step,
)


def test_a_submitted_job_shows_what_was_sent_and_is_in_validation() -> None:
    job = given(SUBMITTED)
    assert (job.job_id, job.status, job.created) == ("ftjob-1", "validation", START)
    assert (job.input_config, job.metadata, job.resources) == (CONFIG, CONFIG["metadata"], RESOURCES)
    assert job.checkpoints == []


@pytest.mark.parametrize(
    ("events", "status"),
    [
        (QUEUED, "queued"),
        ((*QUEUED, ADMITTED), "queued"),
        (RUNNING, "running"),
        ((*RUNNING, interrupted(1)), "queued"),
        ((SUBMITTED, interrupted(0)), "validation"),
        ((*RUNNING, CANCEL), "running"),
        ((*RUNNING, CANCEL, CANCELLED), "cancelled"),
        ((*RUNNING, SUCCEEDED), "success"),
        ((*RUNNING, FAILED), "failed"),
        ((SUBMITTED, REJECTED), "failed"),
    ],
)
def test_each_event_moves_the_status_as_the_contract_says(events: tuple[AnyEvent, ...], status: str) -> None:
    assert given(*events).status == status


def test_an_outcome_is_final() -> None:
    job = given(*RUNNING, SUCCEEDED, CANCEL, CANCELLED, FAILED, started(2))
    assert (job.status, job.error, job.cancel_requested) == ("success", None, False)
    assert job.finished_at == START + timedelta(seconds=len(RUNNING))


def test_a_failed_job_says_why_and_where_the_traceback_is() -> None:
    job = given(*RUNNING, FAILED)
    assert (job.error, job.error_path) == (ERROR, "file:///e.txt")


def test_checkpoints_are_listed_once_in_order() -> None:
    job = given(*RUNNING, saved(1, 40), interrupted(1), started(2), saved(2, 40), saved(2, 80))
    assert job.checkpoints == ["file:///step-40", "file:///step-80"]


def test_the_best_checkpoint_is_marked_and_deleted_ones_are_no_longer_listed() -> None:
    best = saved(1, 40).model_copy(update={"best": True})
    job = given(*RUNNING, best, saved(1, 80), saved(1, 120), CheckpointsDeleted(attempt=1, uris=["file:///step-80"]))
    assert job.checkpoints == ["file:///step-40", "file:///step-120"]
    assert job.best_checkpoint == "file:///step-40"


def test_progress_follows_the_steps() -> None:
    job = given(*RUNNING, measured(1, step(0, epoch=0, loss=None, valid_loss=3.0)), measured(1, step(1), step(2)))
    assert job.progress is not None
    assert job.progress.model_dump() == {"step": 2, "total_steps": 100, "epoch": 1, "n_epochs": 2}


def test_the_first_validation_loss_is_kept_to_show_before_and_after() -> None:
    job = given(
        *RUNNING,
        measured(1, step(0, loss=None, valid_loss=3.0), step(50, valid_loss=2.5)),
        measured(1, step(60, valid_loss=2.0)),
    )
    assert job.metrics is not None
    assert (job.metrics.first_valid_loss, job.metrics.valid_loss, job.metrics.loss) == (3.0, 2.0, 1.0)


def test_rewards_are_among_the_metrics_where_a_step_has_them() -> None:
    rewards = {"rewards_chosen": 0.5, "rewards_rejected": -0.25, "rewards_accuracy": 1.0, "rewards_margin": 0.75}
    job = given(*RUNNING, measured(1, step(1), step(2).model_copy(update=rewards)))
    assert job.metrics is not None
    assert rewards.items() <= job.metrics.model_dump().items()
    plain = given(*RUNNING, measured(1, step(1))).metrics
    assert plain is not None
    assert not [name for name in plain.model_dump(exclude_none=True) if name.startswith("rewards")]


def test_an_interruption_falls_back_to_the_last_checkpoint() -> None:
    job = given(
        *RUNNING,
        measured(1, step(39, loss=2.0), step(40, loss=1.5)),
        saved(1, 40),
        measured(1, step(41, epoch=2, loss=1.4), step(42, epoch=2, loss=1.3)),
        interrupted(1),
    )
    assert job.progress is not None
    assert job.metrics is not None
    assert (job.progress.step, job.metrics.loss) == (40, 1.5)
    assert (job.interruptions, job.admitted) == (1, False)
    assert job.why == "interrupted: a worker died, waiting to resume"


@pytest.mark.parametrize(("number", "completed", "epoch"), [(40, 0, 1), (50, 1, 1), (60, 1, 2), (100, 2, 2)])
def test_a_job_that_fell_back_stands_in_the_epoch_of_the_checkpoint_s_last_step(
    number: int, completed: int, epoch: int
) -> None:
    """Of two epochs of 50 steps. A checkpoint itself tells how many epochs are complete."""
    job = given(*RUNNING, saved(1, number, completed), interrupted(1))
    assert job.progress is not None
    assert (job.progress.step, job.progress.epoch) == (number, epoch)


def test_metrics_that_arrive_after_their_checkpoint_belong_to_it() -> None:
    job = given(*RUNNING, saved(1, 40), measured(1, step(40, loss=1.5)), measured(1, step(41)), interrupted(1))
    assert job.metrics is not None
    assert job.metrics.loss == 1.5


def test_a_checkpoint_recorded_when_training_had_gone_on_brings_the_metrics_of_its_step() -> None:
    late = saved(1, 40).model_copy(update={"metrics": {"loss": 1.5}})
    job = given(*RUNNING, measured(1, step(40, loss=1.5)), measured(1, step(41, loss=1.4)), late, interrupted(1))
    assert job.progress is not None
    assert job.metrics is not None
    assert (job.progress.step, job.metrics.loss) == (40, 1.5)


def test_the_metrics_a_checkpoint_brings_are_of_the_types_that_are_documented() -> None:
    """It holds all of them as floats, and possibly what is no number."""
    measures = {"loss": 1.5, "tokens": 512, "peak_memory_bytes": 1 << 40, "valid_loss": float("nan")}
    late = saved(1, 40).model_copy(update={"metrics": {name: float(value) for name, value in measures.items()}})
    job = given(*RUNNING, measured(1, step(41)), late, interrupted(1))
    with warnings.catch_warnings(action="error"):  # pydantic warns where a value is not of its field's type
        shown = json.loads(job.wire_json())["metrics"]
        assert shown == job.wire()["metrics"]
    assert json.dumps(shown) == '{"loss": 1.5, "tokens": 512, "peak_memory_bytes": 1099511627776}'


def test_the_last_evaluation_is_still_the_last_one_where_a_late_checkpoint_has_none() -> None:
    late = saved(1, 40).model_copy(update={"metrics": {"loss": 1.5}})
    evaluated = measured(1, step(30, loss=None, valid_loss=2.0))
    job = given(*RUNNING, evaluated, measured(1, step(41, loss=1.4)), late, interrupted(1))
    assert job.metrics is not None
    assert (job.metrics.loss, job.metrics.valid_loss) == (1.5, 2.0)


def test_the_steps_a_resumed_run_records_again_replace_the_lost_ones() -> None:
    first = (*RUNNING, saved(1, 40), measured(1, step(41, loss=9.0), step(42, loss=9.0)), interrupted(1))
    job = given(*first, ADMITTED, started(2), measured(2, step(41, loss=1.4)))
    assert job.progress is not None
    assert job.metrics is not None
    assert (job.progress.step, job.metrics.loss, job.attempt) == (41, 1.4, 2)


def test_what_a_replaced_run_says_is_not_heard() -> None:
    job = given(*RUNNING, interrupted(1), started(2), measured(1, step(99)), saved(1, 99))
    assert (job.metrics, job.checkpoints) == (None, [])


def test_a_loss_that_is_not_a_number_is_left_out() -> None:
    job = given(*RUNNING, measured(1, step(1, loss=2.0)), measured(1, step(2, loss=float("nan"))))
    assert job.metrics is not None
    assert job.metrics.loss is None
    json.loads(job.wire_json(), parse_constant=pytest.fail)


def test_the_epochs_come_from_the_config_when_the_run_did_not_say() -> None:
    config = {**CONFIG, "fine_tuning_options": {"n_epochs": 7}}
    run = started(1).model_copy(update={"n_epochs": None})
    job = given(SUBMITTED.model_copy(update={"config": config}), VALIDATED, run)
    assert job.progress is not None
    assert job.progress.n_epochs == 7


def test_a_paused_job_reads_queued_at_its_checkpoint_and_no_interruption_is_counted() -> None:
    pausing = given(*RUNNING, measured(1, step(40), step(41)), PAUSE)
    assert (pausing.status, pausing.why, pausing.pause_requested) == ("running", "pausing", True)
    job = given(*RUNNING, measured(1, step(40)), saved(1, 40), measured(1, step(41)), PAUSE, paused(1))
    assert (job.status, job.why, job.admitted, job.paused) == ("queued", "paused, until it is resumed", False, True)
    assert job.interruptions == 0
    assert job.progress is not None
    assert job.progress.step == 40


@pytest.mark.parametrize("pause", [PAUSE, DRAIN])
def test_a_job_that_goes_on_after_a_pause_stands_in_line(pause: PauseRequested) -> None:
    """After a user's pause when it is resumed, after a drain by itself."""
    resumed = (RESUME,) if pause is PAUSE else ()
    job = given(*RUNNING, pause, paused(1), *resumed)
    assert (job.status, job.why, job.paused) == ("queued", "waiting to resume", False)


def test_a_job_resumed_before_it_has_stopped_stops_all_the_same_and_goes_on() -> None:
    stopping = given(*RUNNING, PAUSE, RESUME)
    assert (stopping.status, stopping.pausing, stopping.pause_requested) == ("running", True, False)
    job = given(*RUNNING, PAUSE, RESUME, paused(1))
    assert (job.status, job.why) == ("queued", "waiting to resume")


def test_a_job_paused_before_its_data_was_read_is_validated_once_it_is_resumed() -> None:
    history = (SUBMITTED, PAUSE, paused(0))
    assert given(*history).status == "queued"
    assert given(*history, RESUME).status == "validation"


def test_a_user_who_pauses_a_job_that_a_drain_is_stopping_has_the_last_word() -> None:
    assert given(*RUNNING, DRAIN, PAUSE, paused(1)).paused


def test_a_paused_job_that_waits_gives_up_its_place() -> None:
    assert not given(*QUEUED, ADMITTED, PAUSE).admitted


def test_cancelling_shows_in_why_until_the_job_is_cancelled() -> None:
    assert given(*RUNNING, CANCEL).why == "cancelling"
    assert given(*RUNNING, CANCEL, interrupted(1)).why == "cancelling"
    assert given(*RUNNING, CANCEL, CANCELLED).why is None


def test_an_event_of_a_newer_version_changes_nothing_but_the_version() -> None:
    before = given(*RUNNING)
    after = given(*RUNNING, UnknownEvent("JobPaused", '{"type":"JobPaused","v":1}'))
    assert after == before.model_copy(update={"version": before.version + 1})


def test_a_history_without_its_beginning_still_replays() -> None:
    assert given(SUCCEEDED).status == "success"
    assert given(measured(3, step(1))).job_id == "ftjob-1"


def test_no_history_is_no_job() -> None:
    assert fold([]) is None


def test_the_wire_view_leaves_out_what_has_no_value_and_what_is_the_folds_own() -> None:
    wire = given(SUBMITTED).wire()
    assert wire["created"] == "2026-11-22T12:00:00Z"
    assert wire["metadata"] == {"team": "a", "ticket": None}  # a null of the user's stays
    absent = {"finished_at", "error", "why", "progress", "version", "admitted", "validated", "saved", "idempotency_key"}
    assert not absent & wire.keys()


def test_the_wire_view_encodes_to_the_same_json() -> None:
    job = given(*RUNNING, measured(1, step(1)), saved(1, 1), FAILED)
    assert json.loads(job.wire_json()) == job.wire()


def test_a_job_pickles_whole() -> None:
    job = given(*RUNNING, measured(1, step(1)), saved(1, 1), interrupted(1))
    assert pickle.loads(pickle.dumps(job)) == job  # noqa: S301  -- our own bytes


def test_the_schema_shows_the_wire_view() -> None:
    schema = FineTuningJob.model_json_schema(mode="serialization")
    assert schema["properties"]["input_config"]["$ref"] == "#/$defs/Config"
    assert schema["properties"]["checkpoints"]["items"] == {"type": "string", "format": "uri"}
    assert "version" not in schema["properties"]
    assert set(schema["required"]) == {"job_id", "created", "status", "input_config"}

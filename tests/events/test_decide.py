"""Which facts may be added to a job, and which are refused."""

import pickle

import pytest

from events.codec import AnyEvent
from events.decide import Refused, decide
from events.facts import DataValidated, Event, JobFailed, JobSucceeded
from events.job import FineTuningJob
from tests.events.facts_of_a_job import (
    ADMITTED,
    CANCEL,
    CANCELLED,
    DRAIN,
    ERROR,
    FAILED,
    PAUSE,
    QUEUED,
    REJECTED,
    REPORT,
    RESUME,
    RUNNING,
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

CANCELLING = (*RUNNING, CANCEL)
PAUSING = (*RUNNING, PAUSE)
PAUSED = (*PAUSING, paused(1))
RESUMED = (*RUNNING, interrupted(1), ADMITTED, started(2))


def job_after(events: tuple[AnyEvent, ...]) -> FineTuningJob | None:
    return given(*events) if events else None


@pytest.mark.parametrize(
    ("history", "event"),
    [
        ((), SUBMITTED),
        ((SUBMITTED,), VALIDATED),
        ((SUBMITTED,), REJECTED),
        ((SUBMITTED,), FAILED),
        ((SUBMITTED,), CANCEL),
        ((SUBMITTED,), interrupted(0)),
        (QUEUED, ADMITTED),
        (QUEUED, CANCEL),
        (QUEUED, FAILED),
        (QUEUED, started(1)),
        ((*QUEUED, ADMITTED), started(1)),
        ((*QUEUED, ADMITTED), interrupted(0)),
        (RUNNING, measured(1, step(1))),
        (RUNNING, saved(1, 1)),
        (RUNNING, interrupted(1)),
        (RUNNING, started(2)),
        (RUNNING, SUCCEEDED),
        (RUNNING, JobSucceeded(attempt=1)),
        (RUNNING, FAILED),
        (RUNNING, CANCEL),
        ((*RUNNING, interrupted(1), ADMITTED), interrupted(1)),
        ((*RUNNING, interrupted(1)), interrupted(1)),  # the runner that waited for the next run
        ((*RUNNING, interrupted(1)), FAILED),
        (RESUMED, measured(2, step(1))),
        (CANCELLING, measured(1, step(1))),
        (CANCELLING, saved(1, 1)),
        (CANCELLING, CANCELLED),
        ((SUBMITTED,), PAUSE),
        (QUEUED, PAUSE),
        (RUNNING, PAUSE),
        (RUNNING, DRAIN),
        ((*RUNNING, DRAIN), PAUSE),
        ((*RUNNING, DRAIN), paused(1)),
        ((*QUEUED, PAUSE), paused(0)),
        ((*QUEUED, ADMITTED, PAUSE), started(1)),  # it was about to start
        (PAUSING, paused(1)),
        (PAUSING, saved(1, 1)),
        (PAUSING, interrupted(1)),
        (PAUSING, SUCCEEDED),
        (PAUSING, RESUME),
        (PAUSING, CANCEL),
        ((*PAUSING, RESUME), PAUSE),
        ((*PAUSING, RESUME), paused(1)),
        (PAUSED, RESUME),
        (PAUSED, CANCEL),
        ((*PAUSED, CANCEL), CANCELLED),
        ((*PAUSED, RESUME), ADMITTED),
    ],
)
def test_what_can_be_true_is_appended(history: tuple[AnyEvent, ...], event: Event) -> None:
    assert decide(job_after(history), event) == [event]


@pytest.mark.parametrize(
    ("history", "event"),
    [
        (QUEUED, VALIDATED),
        (RUNNING, VALIDATED),
        ((*QUEUED, ADMITTED), ADMITTED),
        ((*RUNNING, saved(1, 40)), saved(1, 40)),
        (CANCELLING, CANCEL),
        ((*CANCELLING, CANCELLED), CANCEL),
        ((*CANCELLING, CANCELLED), CANCELLED),
        ((*RUNNING, SUCCEEDED), SUCCEEDED),
        ((*RUNNING, FAILED), FAILED),
        ((SUBMITTED, REJECTED), REJECTED),
        (PAUSING, PAUSE),
        (PAUSING, DRAIN),
        ((*RUNNING, DRAIN), DRAIN),
        (PAUSED, PAUSE),
        (PAUSED, paused(1)),
        (RUNNING, paused(1)),
        (RUNNING, RESUME),
        ((*PAUSED, RESUME), RESUME),
    ],
)
def test_what_is_true_already_adds_nothing(history: tuple[AnyEvent, ...], event: Event) -> None:
    assert decide(job_after(history), event) == []


@pytest.mark.parametrize(
    ("history", "event", "code"),
    [
        ((), VALIDATED, "unknown_job"),
        ((), CANCEL, "unknown_job"),
        ((SUBMITTED,), SUBMITTED, "job_exists"),
        ((SUBMITTED,), ADMITTED, "out_of_order"),
        ((SUBMITTED,), started(1), "out_of_order"),
        ((SUBMITTED,), SUCCEEDED, "out_of_order"),
        (QUEUED, REJECTED, "out_of_order"),
        (QUEUED, SUCCEEDED, "out_of_order"),
        (QUEUED, DataValidated(data=REPORT.model_copy(update={"rows": 11})), "out_of_order"),
        (QUEUED, started(2), "out_of_order"),
        (QUEUED, CANCELLED, "not_cancelling"),
        (QUEUED, measured(1, step(1)), "out_of_order"),
        (RUNNING, started(1), "stale_attempt"),
        (RUNNING, started(3), "out_of_order"),
        (RUNNING, interrupted(0), "stale_attempt"),
        (RUNNING, interrupted(2), "out_of_order"),
        (RUNNING, CANCELLED, "not_cancelling"),
        ((*RUNNING, interrupted(1)), interrupted(0), "stale_attempt"),
        ((*RUNNING, interrupted(1)), measured(1, step(1)), "stale_attempt"),
        ((*RUNNING, interrupted(1)), saved(1, 1), "stale_attempt"),
        (RESUMED, measured(1, step(1)), "stale_attempt"),
        (RESUMED, saved(1, 1), "stale_attempt"),
        (RESUMED, interrupted(1), "stale_attempt"),
        (RESUMED, JobSucceeded(attempt=1), "stale_attempt"),
        (RESUMED, JobFailed(attempt=1, error=ERROR), "stale_attempt"),
        (CANCELLING, SUCCEEDED, "cancelling"),
        (CANCELLING, FAILED, "cancelling"),
        (CANCELLING, interrupted(1), "cancelling"),
        ((SUBMITTED, CANCEL), VALIDATED, "cancelling"),
        ((*QUEUED, CANCEL), ADMITTED, "cancelling"),
        ((*QUEUED, CANCEL), started(1), "cancelling"),
        (CANCELLING, PAUSE, "cancelling"),
        ((*QUEUED, PAUSE), ADMITTED, "out_of_order"),
        (PAUSED, ADMITTED, "out_of_order"),
        (PAUSED, started(2), "out_of_order"),
        (PAUSED, interrupted(1), "out_of_order"),
        (PAUSED, CANCELLED, "not_cancelling"),
        ((*RESUMED, PAUSE), paused(1), "stale_attempt"),
        ((*RUNNING, SUCCEEDED), PAUSE, "job_is_over"),
        ((*RUNNING, SUCCEEDED), RESUME, "job_is_over"),
        ((*CANCELLING, CANCELLED), SUCCEEDED, "job_is_over"),
        ((*RUNNING, SUCCEEDED), CANCEL, "job_is_over"),
        ((*RUNNING, FAILED), CANCEL, "job_is_over"),
        ((*RUNNING, FAILED), JobFailed(error=ERROR.model_copy(update={"code": "other"})), "job_is_over"),
        ((*RUNNING, SUCCEEDED), measured(1, step(1)), "job_is_over"),
    ],
)
def test_what_can_not_be_true_is_refused_with_its_reason(
    history: tuple[AnyEvent, ...], event: Event, code: str
) -> None:
    with pytest.raises(Refused) as refused:
        decide(job_after(history), event)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("history", "ended"),
    [
        ((*RUNNING, SUCCEEDED), "has succeeded"),
        ((*RUNNING, FAILED), "has failed"),
        ((*CANCELLING, CANCELLED), "was cancelled"),
    ],
)
def test_a_job_that_is_over_says_how_it_ended(history: tuple[AnyEvent, ...], ended: str) -> None:
    with pytest.raises(Refused) as refused:
        decide(job_after(history), PAUSE)
    assert str(refused.value).endswith(f" {ended}")


def test_a_refusal_survives_pickling() -> None:
    refused = pickle.loads(pickle.dumps(Refused("job_is_over", "it is over")))  # noqa: S301  -- our own bytes
    assert (refused.code, str(refused)) == ("job_is_over", "it is over")

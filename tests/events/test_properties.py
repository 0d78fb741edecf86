"""The fold and its rules hold for every sequence of events, legal or not."""

import json
from datetime import datetime, timedelta
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.codec import AnyEvent, decode, encode
from events.decide import Refused, decide
from events.facts import Event, JobCancelled, JobSucceeded, RunInterrupted
from events.job import FineTuningJob, evolve
from events.store import Recorded
from tests.events.any_event import events
from tests.events.facts_of_a_job import RUNNING, START, history, interrupted

sequences = st.lists(events, max_size=12) | st.lists(events, max_size=12).map(lambda more: [*RUNNING, *more])


def accepted(proposals: list[Event]) -> list[tuple[FineTuningJob, Recorded]]:
    """The proposals that `decide` lets in, each with the job after it."""
    job: FineTuningJob | None = None
    steps: list[tuple[FineTuningJob, Recorded]] = []
    for event in proposals:
        try:
            for new in decide(job, event):
                recorded = at(len(steps), new)
                job = evolve(job, recorded)
                steps.append((job, recorded))
        except Refused:
            continue
    return steps


def at(version: int, event: AnyEvent) -> Recorded:
    time: datetime = START + timedelta(seconds=version)
    return Recorded(version + 1, "ftjob-1", version, f"e{version}", time, event)


@given(sequences)
def test_every_sequence_folds_and_its_job_can_be_shown(proposals: list[Event]) -> None:
    job: FineTuningJob | None = None
    for recorded in history(proposals):
        job = evolve(job, recorded)
        json.loads(job.wire_json(), parse_constant=pytest.fail)
        assert job.version == recorded.version


@given(sequences)
def test_a_job_has_at_most_one_outcome_and_nothing_after_it(proposals: list[Event]) -> None:
    steps = accepted(proposals)
    assert [job.over for job, _ in steps[:-1]] == [False] * (len(steps) - 1 if steps else 0)


@given(sequences)
def test_a_job_that_was_asked_to_cancel_only_ever_ends_as_cancelled(proposals: list[Event]) -> None:
    for job, recorded in accepted(proposals):
        if job.cancel_requested:
            assert not isinstance(recorded.event, JobSucceeded)
            assert job.status not in ("success", "failed")
        assert not isinstance(recorded.event, JobCancelled) or job.cancel_requested


@given(sequences)
def test_attempts_count_up_by_one(proposals: list[Event]) -> None:
    attempts = [0, *(job.attempt for job, _ in accepted(proposals))]
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(attempts))


@given(sequences)
def test_every_loss_of_a_runner_is_let_in_and_counted(proposals: list[Event]) -> None:
    """Except for a job that is to have no runner."""
    steps = accepted(proposals)
    losses = accumulate(isinstance(recorded.event, RunInterrupted) for _, recorded in steps)
    assert [job.interruptions for job, _ in steps] == list(losses)
    for job, _ in steps:
        if not (job.over or job.cancel_requested or job.paused):
            assert decide(job, interrupted(job.attempt)) == [interrupted(job.attempt)]


@given(sequences)
def test_proposing_an_event_again_never_adds_an_outcome(proposals: list[Event]) -> None:
    once = accepted(proposals)
    twice = accepted([event for event in proposals for _ in range(2)])
    assert [job.status for job, _ in once if job.over] == [job.status for job, _ in twice if job.over]


@given(sequences)
def test_a_job_rebuilt_from_what_was_written_is_the_same(proposals: list[Event]) -> None:
    rebuilt: FineTuningJob | None = None
    for job, recorded in accepted(proposals):
        rebuilt = evolve(rebuilt, at(recorded.version, decode(encode(recorded.event))))
        assert repr(rebuilt) == repr(job)

"""The phases between a submit and the first training step, and their times, from the job's events and log lines."""

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise

from events.facts import DataValidated, JobAdmitted, JobSubmitted, MetricsRecorded, RunStarted
from events.store import Recorded

PHASES = (
    "POST to durable",
    "Ray Job: start the driver, up to its first log line",
    "model and data: resolve, validate, tokenise",
    "admission",
    "placement group, worker, imports, up to the start of training",
    "first step: load the model, forward, backward, update",
    "total",
)


def phases(posted: datetime, history: Sequence[Recorded], lines: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Seconds by phase. `posted` is when the client sent the request, `lines` are (timestamp, message)."""
    at = {type(recorded.event): recorded.time for recorded in reversed(history)}
    recorded = next(r.event for r in history if isinstance(r.event, MetricsRecorded) and r.event.steps[0].loss)
    assert isinstance(recorded, MetricsRecorded)
    moments = [
        posted,
        at[JobSubmitted],
        datetime.fromisoformat(lines[0][0]),
        at[DataValidated],
        at[JobAdmitted],
        at[RunStarted],
        datetime.fromisoformat(recorded.steps[0].time),
    ]
    taken = [(after - before).total_seconds() for before, after in pairwise(moments)]
    return dict(zip(PHASES, [*taken, (moments[-1] - posted).total_seconds()], strict=True))

"""A job's events in OpenAI's format. Each is derived from one event of the log, whose version is part of its id."""

import re

from events import facts
from events.job import FineTuningJob
from events.store import Recorded
from serve_app.backend import JobLog
from serve_app.openai import results
from serve_app.openai.objects import OpenAIJobEvent
from serve_app.openai.paging import unknown_after

_PAUSING = {
    "user": "Pausing",
    "shutdown": "Pausing: the service is being shut down. The job goes on by itself when it is back",
    "node_drain": "Pausing: one of the job's nodes is being drained. The job goes on by itself on other nodes",
}
"""The message, by who asked for the pause."""


async def events_before(
    log: JobLog, job: FineTuningJob, after: str | None, limit: int
) -> tuple[list[OpenAIJobEvent], bool]:
    """Up to `limit` events older than the event `after`, newest first, and whether there are more.

    Reads only the part of the log that it needs. Raises RequestRefused if `after` is not an event of the job.
    """
    last = job.version if after is None else _version(job, after)
    found: list[OpenAIJobEvent] = []
    seen = after is None
    while last >= 0 and len(found) <= limit:
        first = max(last - limit, 0)
        for recorded in reversed(await log.read(job.job_id, first - 1, last - first + 1)):
            for event in reversed(events_of(job, recorded)):
                if seen:
                    found.append(event)
                seen = seen or event.id == after
        if not seen:
            break
        last = first - 1
    if not seen:
        raise unknown_after(str(after), "event")
    return found[:limit], len(found) > limit


def events_of(job: FineTuningJob, recorded: Recorded) -> list[OpenAIJobEvent]:
    """OpenAI's events for one event of the log, in order. Empty if it means nothing to a user of OpenAI's API."""
    if isinstance(recorded.event, facts.MetricsRecorded):
        return [_metrics(job, recorded, number, step) for number, step in enumerate(recorded.event.steps)]
    messages = _messages(job, recorded.event)
    level = "error" if isinstance(recorded.event, facts.JobFailed | facts.DataRejected) else "info"
    if isinstance(recorded.event, facts.RunInterrupted):
        level = "warn"
    return [
        OpenAIJobEvent(
            id=_id(job, recorded, number),
            created_at=int(recorded.time.timestamp()),
            level=level,  # type: ignore[arg-type]  # one of the three
            message=message,
            type="message",
            data={},
        )
        for number, message in enumerate(messages)
    ]


def _messages(job: FineTuningJob, event: object) -> list[str]:
    config = job.input_config
    match event:
        case facts.JobSubmitted():
            names = [str(config[name]) for name in ("data", "validation_data") if config.get(name)]
            return [f"Created fine-tuning job: {job.job_id}", f"Validating: {' and '.join(names)}"]
        case facts.DataValidated():
            return [f"Data validated: {event.data.rows:,} rows, {event.data.tokens:,} tokens. The job is queued"]
        case facts.RunStarted():
            workers = "1 worker" if event.workers == 1 else f"{event.workers} workers"
            return [f"Training started (attempt {event.attempt}) on {workers}: {event.device}"]
        case facts.CheckpointSaved():
            return [f"Checkpoint saved at step {event.step}"]
        case facts.RunInterrupted():
            return [f"Interrupted: {event.reason}. The job goes on from its last checkpoint"]
        case facts.PauseRequested():
            return [_PAUSING[event.by]]
        case facts.JobPaused():
            return ["The job has stopped at a checkpoint and holds no resources"]
        case facts.JobResumed():
            return ["Resumed"]
        case facts.CancelRequested():
            return ["Cancelling"]
        case facts.JobSucceeded():
            return ["The job has succeeded"]
        case facts.JobFailed() | facts.DataRejected():
            return [f"The job has failed: {event.error.message}"]
        case facts.JobCancelled():
            return ["The job was cancelled"]
    return []


def _metrics(job: FineTuningJob, recorded: Recorded, number: int, metrics: facts.StepMetrics) -> OpenAIJobEvent:
    total = job.progress.total_steps if job.progress else None
    values = results.measured(metrics, total)
    kind, value = ("training", metrics.loss) if metrics.loss is not None else ("full validation", metrics.valid_loss)
    return OpenAIJobEvent(
        id=_id(job, recorded, number),
        created_at=int(recorded.time.timestamp()),
        level="info",
        message=f"Step {metrics.step}/{total}: {kind} loss={'none' if value is None else f'{value:.4f}'}",
        type="metrics",
        data=values,
    )


def _id(job: FineTuningJob, recorded: Recorded, number: int) -> str:
    return f"ftevent-{job.job_id.removeprefix('ftjob-')}-{recorded.version}-{number}"


def _version(job: FineTuningJob, event_id: str) -> int:
    """The version of the log's event that this id was made of. Raises RequestRefused if it can't be of this job."""
    own = re.escape(job.job_id.removeprefix("ftjob-"))
    found = re.fullmatch(rf"ftevent-{own}-(\d{{1,12}})-\d{{1,12}}", event_id)
    if found is None or int(found[1]) > job.version:
        raise unknown_after(event_id, "event")
    return int(found[1])

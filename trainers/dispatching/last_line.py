"""The line that the dispatcher writes to a job's log about its end or a break, when the job's processes are gone."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from events.facts import Event, JobCancelled, JobFailed, JobPaused, RunInterrupted
from events.job import FineTuningJob


def last_line(job: FineTuningJob, event: Event) -> str | None:
    """The line that tells a reader of the log about `event`; `job` is as it was before it. None for other events."""
    match event:
        case JobCancelled():
            return f"cancelled {_how_far(job)}"
        case JobPaused():
            return f"stopped {_how_far(job)}; it goes on {'once it is resumed' if job.pause_requested else 'by itself'}"
        case RunInterrupted():
            count = f"interruption {job.interruptions + 1}, and --max-restarts is {job.max_restarts}"
            return f"interrupted {_how_far(job)}: {event.reason}; that was {count}"
        case JobFailed():
            return f"job failed ({event.error.code}, fault of the {event.error.fault}): {event.error.message}"
        case _:
            return None


def _how_far(job: FineTuningJob) -> str:
    if job.progress is None:
        return "before its training began"
    last = Path(unquote(urlsplit(job.checkpoints[-1]).path)) if job.checkpoints else None
    left = f"its last checkpoint: {last}" if last else "it has no checkpoint"
    return f"after step {job.progress.step} of {job.progress.total_steps} ({left})"

"""What happened: the job vocabulary, the fold, the event store, and the two actors that keep events and log lines.

Imports nothing of `trainers` or `serve_app`, and no torch. The actors are in `events.actors`, which imports Ray.
"""

from events.config import Config
from events.decide import Refused, decide
from events.ids import is_job_id, new_event_id, new_job_id
from events.job import TERMINAL, FineTuningJob, Status, evolve, fold
from events.log import EventLog, LogUnavailable
from events.log_queue import LogBatch, LogQueue
from events.memory import MemoryStore
from events.sqlite import SqliteStore
from events.store import ExpectedVersionError, Recorded

__all__ = [
    "TERMINAL",
    "Config",
    "EventLog",
    "ExpectedVersionError",
    "FineTuningJob",
    "LogBatch",
    "LogQueue",
    "LogUnavailable",
    "MemoryStore",
    "Recorded",
    "Refused",
    "SqliteStore",
    "Status",
    "decide",
    "evolve",
    "fold",
    "is_job_id",
    "new_event_id",
    "new_job_id",
]

"""Keeps a runner that was replaced from changing its job, and ends it.

A runner's tenure lasts from one interruption of the job to the next. The dispatcher records an interruption before it
starts another runner, so the number of interruptions identifies a job's runners, also those that were lost before their
training began. docs/decisions/0015 has the reasons.
"""

import logging
import os
import threading
from collections.abc import Callable
from functools import partial

from events.actors import AnyLog, blocking
from events.decide import Refused
from events.facts import Event
from events.ids import new_event_id
from events.job import FineTuningJob
from events.log import LogUnavailable
from events.store import ExpectedVersionError
from trainers.retrying import retrying

logger = logging.getLogger("tunewright.train")

WATCH_S = 5.0
"""Seconds between two checks of a worker's tenure. A call to the log that hangs may add its time-out to that."""


class Superseded(Exception):
    """The job is over, paused, being cancelled, or another runner's: this runner's reports no longer count."""


class Cancelled(Superseded):
    """The job is cancelled, or is about to be."""


class Tenure:
    """The right of one runner and its workers to append events to their job. Once it has ended, they are refused."""

    def __init__(self, log: AnyLog, job_id: str, interruptions: int) -> None:
        """`interruptions`: the job's count when the runner took it."""
        self._log = log
        self._job_id = job_id
        self.interruptions = interruptions

    def check(self, job: FineTuningJob) -> None:
        """Raises Superseded if `job`, as the log has it now, is over, paused, being cancelled or another runner's."""
        if job.over:
            state: str = job.status
        elif job.interruptions != self.interruptions:
            state = f"after interruption {job.interruptions}, another runner's"
        elif job.cancel_requested:
            state = "being cancelled"
        elif job.paused:
            state = "paused"
        else:
            return
        kind = Cancelled if job.cancel_requested else Superseded
        raise kind(f"job {self._job_id} is {state}")

    def append(self, event: Event) -> FineTuningJob:
        """Appends the event, provided that the tenure still lasts at the moment of the append. It goes on after an
        interruption that is recorded here. Raises Superseded, Refused or LogUnavailable."""
        event_id = new_event_id()
        while True:
            job = retrying(lambda: self._log.job(self._job_id))
            self.check(job)
            try:
                job = retrying(partial(self._log.append, self._job_id, [event], [event_id], job.version))
            except ExpectedVersionError:
                continue  # another event came in between, which may have ended the tenure
            self.interruptions = job.interruptions
            return job


class Watch:
    """A thread that ends this process, a worker of `attempt`, within seconds after it was replaced or its job
    cancelled. The process can't be left to end by itself: a step may take minutes, and a collective call without its
    partner may never return.

    Every few seconds `look` is called with the job as the log has it, and `leave`, with the reason, before the process
    ends. `close` stops the watch.
    """

    def __init__(
        self,
        log: AnyLog,
        job_id: str,
        attempt: int,
        tenure: Tenure,
        look: Callable[[FineTuningJob], None],
        leave: Callable[[Exception], None],
    ) -> None:
        self._log = log
        self._job_id = job_id
        self._attempt = attempt
        self._tenure = tenure
        self._look = look
        self._leave = leave
        self._done = threading.Event()
        threading.Thread(target=self._watch, name="tenure", daemon=True).start()

    def close(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(WATCH_S):
            try:
                job = blocking(self._log.job(self._job_id))
                self._check(job)
                self._look(job)
            except LogUnavailable:
                continue
            except (Superseded, Refused) as reason:
                if self._done.is_set():
                    return
                logger.warning("attempt %d ends here: %s", self._attempt, reason)
                self._leave(reason)
                os._exit(1)

    def _check(self, job: FineTuningJob) -> None:
        self._tenure.check(job)
        if job.attempt > self._attempt or (job.attempt == self._attempt and job.status != "running"):
            raise Superseded(f"job {self._job_id} is {job.status}, at attempt {job.attempt}")

"""Who may speak for a job: a runner that was replaced can't change it any more, and ends.

A runner's tenure lasts from one interruption of the job to the next. The dispatcher records an interruption before it
starts another runner, so the number of interruptions tells the runners of a job apart, also those that were lost before
their training began. docs/decisions/0015 has the reasons.
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
"""How often a worker asks whether it is still the one. A call to the log that hangs may add its time-out to it."""


class Superseded(Exception):
    """The job is over, being cancelled, or goes on without this runner: whatever that one has to say counts no more."""


class Cancelled(Superseded):
    """The job is cancelled, or is about to be."""


class Tenure:
    """One runner's hold on its job, and that of its workers: what they append is written only while it lasts."""

    def __init__(self, log: AnyLog, job_id: str, interruptions: int) -> None:
        """`interruptions`: those the job had when the runner took it."""
        self._log = log
        self._job_id = job_id
        self.interruptions = interruptions

    def check(self, job: FineTuningJob) -> None:
        """Raises Superseded when `job`, as the log has it now, is over, paused, being cancelled or another runner's."""
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
        """Appends the event if the tenure lasts at that very moment; the tenure goes on after an interruption that it
        records itself. Raises Superseded, Refused or LogUnavailable."""
        event_id = new_event_id()
        while True:
            job = retrying(lambda: self._log.job(self._job_id))
            self.check(job)
            try:
                job = retrying(partial(self._log.append, self._job_id, [event], [event_id], job.version))
            except ExpectedVersionError:
                continue  # something was recorded in between: it may have ended the tenure
            self.interruptions = job.interruptions
            return job


class Watch:
    """Ends this process, a worker of `attempt`, within seconds after it was replaced or its job was cancelled, whatever
    it is doing then: a step may take minutes, and a collective call whose partner is gone may never return. Until
    `close`.

    Before that, `look` is called every few seconds with the job as the log has it, and `leave` at the end, with the
    reason."""

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

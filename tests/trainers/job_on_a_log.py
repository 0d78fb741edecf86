"""One job on an event log in memory, for tests of those who write its history."""

from events.facts import Event
from events.ids import new_event_id
from events.job import FineTuningJob
from events.log import EventLog
from events.memory import MemoryStore
from tests.events.facts_of_a_job import ADMITTED, SUBMITTED, VALIDATED
from trainers.retrying import retrying
from trainers.running.tenure import Tenure

JOB = "ftjob-1"


class JobOnALog:
    """It is admitted. Its runners come and go."""

    def __init__(self) -> None:
        self.log = EventLog(MemoryStore())
        retrying(lambda: self.log.submit(JOB, SUBMITTED, new_event_id(), 10))
        self.tell(VALIDATED, ADMITTED)

    @property
    def job(self) -> FineTuningJob:
        return retrying(lambda: self.log.job(JOB))

    def tell(self, *events: Event) -> None:
        retrying(lambda: self.log.append(JOB, list(events), [new_event_id() for _ in events]))

    def runner(self) -> Tenure:
        return Tenure(self.log, JOB, self.job.interruptions)

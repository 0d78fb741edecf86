"""What the door needs of the service behind it. `trainers.service.Service` is one; tests build one without Ray."""

from collections.abc import Mapping
from typing import Protocol

from events.facts import Event, JobSubmitted, Resources
from events.job import FineTuningJob
from events.log import LiveJobs
from events.log_queue import LogBatch
from events.store import Recorded
from trainers.estimate import Found
from trainers.models.architecture import Architecture
from trainers.plan import Plan
from trainers.settings import Settings


class JobLog(Protocol):
    """The part of `events.log.EventLog` used here. Every method may raise Refused and LogUnavailable."""

    async def submit(
        self, job_id: str, event: JobSubmitted, event_id: str, max_live_jobs: int, *, retried: bool = False
    ) -> FineTuningJob: ...
    async def answered(self, job_id: str) -> None: ...
    async def append(self, job_id: str, events: list[Event], event_ids: list[str]) -> FineTuningJob: ...
    async def job(self, job_id: str) -> FineTuningJob: ...
    async def job_json(self, job_id: str) -> bytes: ...
    async def jobs(self, limit: int, after: str | None) -> tuple[list[FineTuningJob], bool]: ...
    async def live_jobs(self) -> LiveJobs: ...
    async def read(self, job_id: str, after_version: int, limit: int) -> list[Recorded]: ...
    async def wait(self, job_id: str, after_version: int, wait_s: float) -> FineTuningJob: ...


class LogLines(Protocol):
    """The part of `events.log_queue.LogQueue` used here."""

    async def read(self, job_id: str, after: int, limit: int, wait_s: float) -> LogBatch: ...


class Backend(Protocol):
    @property
    def settings(self) -> Settings: ...
    @property
    def log(self) -> JobLog: ...
    @property
    def logs(self) -> LogLines: ...

    async def whys(self) -> Mapping[str, str]:
        """Why each job that waits does so, by job id."""
        ...

    async def resources(self, plan: Plan, architecture: Architecture | None) -> Resources:
        """What the plan's workers will hold. Raises ConfigProblems when this cluster can never provide it."""
        ...

    async def estimate(self, plan: Plan, resources: Resources) -> Found:
        """What a job of the plan would take. Raises ConfigProblems and JobProblem."""
        ...

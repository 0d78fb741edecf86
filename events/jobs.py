"""All jobs in memory, folded from their events (`Jobs`), and the changes that one commit makes to them (`Draft`)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from events.decide import Refused, decide
from events.facts import JobSubmitted
from events.job import FineTuningJob, evolve
from events.store import NO_STREAM, ExpectedVersionError, NewEvent, Recorded

REPETITION = timedelta(seconds=60)
"""How long after a submit an identical one may count as a retry of it."""


class Jobs:
    """All jobs as of `position`. Only `adopt` changes them, once the events are on disk."""

    def __init__(self) -> None:
        self.position = 0
        self.time: datetime | None = None
        self._jobs: dict[str, FineTuningJob] = {}
        self._numbers: dict[str, int] = {}
        self._order: list[str] = []
        self._live: dict[str, None] = {}
        self._by_key: dict[str, str] = {}
        self._damaged: dict[str, str] = {}  # error messages; the store's thread may add one at any time
        self._by_digest: dict[str, str] = {}  # of the last minute, oldest first
        self._answered: set[str] = set()  # jobs of `_by_digest` whose answer was delivered, as far as is known

    @classmethod
    def of(cls, position: int, time: datetime | None, jobs: Iterable[FineTuningJob]) -> "Jobs":
        """`jobs` in the order they were submitted, as of `position`."""
        restored = cls()
        draft = Draft(restored)
        for job in jobs:
            draft.put(job)
        draft.position, draft.time = position, time
        restored.adopt(draft)
        return restored

    def all(self) -> list[FineTuningJob]:
        """Oldest first."""
        return [self._jobs[job_id] for job_id in self._order]

    def damage(self, job_id: str, why: str) -> None:
        """Stops serving the job: its state may be wrong."""
        self._refuse(
            job_id, f"the history of job {job_id} is damaged: {why}; the operator has to restore it from a backup"
        )

    def not_understood(self, job_id: str, why: str) -> None:
        """Stops serving the job: another version of Tunewright began it."""
        self._refuse(job_id, f"job {job_id} can't be served: {why}; the operator has to run the version that wrote it")

    def _refuse(self, job_id: str, message: str) -> None:
        self._damaged.setdefault(job_id, message)

    def check(self, job_id: str) -> None:
        """Raises Refused `job_damaged`."""
        if (message := self._damaged.get(job_id)) is not None:
            raise Refused("job_damaged", message)

    def any_damaged(self) -> bool:
        return bool(self._damaged)

    def get(self, job_id: str) -> FineTuningJob | None:
        return self._jobs.get(job_id)

    def with_key(self, idempotency_key: str) -> str | None:
        return self._by_key.get(idempotency_key)

    def with_digest(self, request_digest: str) -> str | None:
        return self._by_digest.get(request_digest)

    def answer(self, job_id: str) -> None:
        """Notes that the answer to the job's submit was delivered."""
        job = self._jobs.get(job_id)
        if job is not None and self._by_digest.get(job.request_digest or "") == job_id:
            self._answered.add(job_id)

    def is_answered(self, job_id: str) -> bool:
        return job_id in self._answered

    def live(self) -> list[FineTuningJob]:
        """Jobs without an outcome, oldest first. Damaged ones are left out."""
        return [self._jobs[job_id] for job_id in self._live if job_id not in self._damaged]

    def live_count(self) -> int:
        return len(self._live) - sum(job_id in self._live for job_id in tuple(self._damaged))

    def page(self, limit: int, after: str | None) -> tuple[list[FineTuningJob], bool]:
        """Up to `limit` jobs older than `after`, newest first, and whether there are more. Damaged ones are left out.

        Raises KeyError when there is no job `after`.
        """
        start = len(self._order) if after is None else self._numbers[after]
        page: list[FineTuningJob] = []
        while start and len(page) < limit:
            start -= 1
            if (job_id := self._order[start]) not in self._damaged:
                page.append(self._jobs[job_id])
        return page, start > 0

    def adopt(self, draft: "Draft") -> None:
        for job_id, job in draft.changed.items():
            if job_id not in self._jobs:
                self._numbers[job_id] = len(self._order)
                self._order.append(job_id)
            self._jobs[job_id] = job
            if job.over:
                self._live.pop(job_id, None)
            else:
                self._live[job_id] = None
        self._by_key.update(draft.keys)
        self.position = draft.position
        self.time = draft.time
        self._adopt_digests(draft.digests)

    def _adopt_digests(self, digests: Mapping[str, str]) -> None:
        """Adds digests, and forgets those older than REPETITION."""
        for digest, job_id in digests.items():
            self._answered.discard(self._by_digest.pop(digest, ""))
            self._by_digest[digest] = job_id
        while self._by_digest and self.time is not None:
            digest, job_id = next(iter(self._by_digest.items()))
            if self.time - self._jobs[job_id].created <= REPETITION:
                return
            del self._by_digest[digest]
            self._answered.discard(job_id)


class Draft:
    """The events that one commit will write, and the jobs as they will be then. Proposals are decided in order, each on
    top of the ones before it. Nothing takes effect until the store has written `events` and `Jobs.adopt` is called."""

    def __init__(self, jobs: Jobs) -> None:
        self.changed: dict[str, FineTuningJob] = {}
        self.keys: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.events: list[tuple[Recorded, str]] = []  # as `EventStore.append` takes them
        self.position = jobs.position
        self.time = jobs.time
        self._jobs = jobs
        self._known: set[str] = set()
        self._live_change = 0

    def replay(self, history: Iterable[Recorded]) -> None:
        """Folds events that are in the store already."""
        for recorded in history:
            self._put(evolve(self._get(recorded.job_id), recorded), recorded.position, recorded.time)

    def know(self, event_ids: Iterable[str]) -> None:
        """Marks event ids as written before: proposing them again adds nothing."""
        self._known.update(event_ids)

    def submit(
        self, job_id: str, new: NewEvent, max_live_jobs: int, time: datetime, *, retried: bool = False
    ) -> FineTuningJob:
        event = new.event
        assert isinstance(event, JobSubmitted)  # noqa: S101  -- EventLog.submit takes nothing else
        if new.event_id not in self._known:
            if event.idempotency_key is not None and (earlier := self._with_key(event.idempotency_key)) is not None:
                if not same_request(earlier, event.config, event.openai):
                    raise key_reused(earlier)
                return earlier
            if event.request_digest is not None and (same := self._unanswered(event.request_digest, time, retried)):
                return same
            live = self._jobs.live_count() + self._live_change
            if live >= max_live_jobs:
                raise Refused(
                    "too_many_jobs",
                    f"{live} jobs are unfinished, and the limit is {max_live_jobs}: try again when one has ended",
                )
        return self.append(job_id, [new], None, time)

    def append(
        self, job_id: str, events: Sequence[NewEvent], expected_version: int | None, time: datetime
    ) -> FineTuningJob:
        """Adds all of the events, or none if it raises Refused or ExpectedVersionError."""
        self._jobs.check(job_id)
        job = self._get(job_id)
        fresh = {new.event_id: new for new in events if new.event_id not in self._known}
        actual = NO_STREAM if job is None else job.version
        if fresh and expected_version not in (None, actual):
            raise ExpectedVersionError(job_id, expected_version, actual)
        accepted: list[tuple[Recorded, str]] = []
        for event_id, event, body in fresh.values():
            if job is None and not isinstance(event, JobSubmitted):
                break  # refused below, with the job's id
            if decide(job, event):  # type: ignore[arg-type]  # only Event comes in here
                version = NO_STREAM + 1 if job is None else job.version + 1
                recorded = Recorded(self.position + len(accepted) + 1, job_id, version, event_id, time, event)
                job = evolve(job, recorded)
                accepted.append((recorded, body))
        if job is None:
            raise Refused("unknown_job", f"there is no job {ascii(job_id)[1:-1]}")
        if accepted:
            self._put(job, self.position + len(accepted), time)
            self.events += accepted
            self._known.update([recorded.event_id for recorded, _ in accepted])
        return job

    def put(self, job: FineTuningJob) -> None:
        """Sets the new state of a job."""
        before = self._get(job.job_id)
        self._live_change += (not job.over) - (before is not None and not before.over)
        self.changed[job.job_id] = job
        if before is None and job.idempotency_key is not None:
            self.keys[job.idempotency_key] = job.job_id
        if before is None and job.request_digest is not None:
            self.digests.pop(job.request_digest, None)  # the order is that of the submits
            self.digests[job.request_digest] = job.job_id

    def _put(self, job: FineTuningJob, position: int, time: datetime) -> None:
        self.put(job)
        self.position = position
        self.time = time

    def _get(self, job_id: str) -> FineTuningJob | None:
        return self.changed.get(job_id) or self._jobs.get(job_id)

    def _with_key(self, key: str) -> FineTuningJob | None:
        job_id = self.keys.get(key) or self._jobs.with_key(key)
        if job_id is None:
            return None
        self._jobs.check(job_id)
        return self._get(job_id)

    def _unanswered(self, digest: str, time: datetime, retried: bool) -> FineTuningJob | None:
        """The job of an identical request within REPETITION, if this one is a retry of it: the sender says so, or the
        answer to the first one is not known to be delivered."""
        job_id = self.digests.get(digest) or self._jobs.with_digest(digest)
        job = None if job_id is None else self._get(job_id)
        if job is None or time - job.created > REPETITION:
            return None
        self._jobs.check(job.job_id)
        return job if retried or not self._jobs.is_answered(job.job_id) else None


def same_request(job: FineTuningJob, config: Mapping[str, Any], openai: Mapping[str, Any] | None) -> bool:
    """Whether the job was submitted with this config and, through /v1, with this request, which has fields that the
    config lacks (the suffix of the model's name)."""
    return _canonical([job.input_config, job.openai]) == _canonical([config, openai])


def key_reused(job: FineTuningJob) -> Refused:
    return Refused(
        "idempotency_key_reused",
        f"this Idempotency-Key was used for job {job.job_id}, with another config: use a new key for a new job",
    )


def _canonical(request: object) -> str:
    return json.dumps(request, sort_keys=True)

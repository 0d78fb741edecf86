"""`EventLog`: the only writer of the event store, with all jobs folded in memory. Plain asyncio, without Ray.

Appends that arrive while a commit is in flight are written together by the next one (group commit), so one fsync serves
many appends. Every event that is returned or read is on disk.

A job whose events are damaged is refused with `job_damaged`; the others are served. Damage is found when events are
read: at the start, those after the snapshot; after each start, a thread reads the whole store.
"""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

from events.bell import Bell
from events.codec import UnknownEvent
from events.decide import Refused
from events.facts import Event, JobSubmitted
from events.job import FineTuningJob
from events.jobs import Draft, Jobs
from events.snapshot import restored, take
from events.store import (
    EventStore,
    ExpectedVersionError,
    JobDamagedError,
    NewEvent,
    Recorded,
    StoreFailedError,
)

_PAGE = 1000
_CACHED_JSON = 4096
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ANY = object()  # the bell's key for "anything was appended"
_SNAPSHOT_EVENTS = 20_000
"""A snapshot is written after this many events: about so many have to be folded at the next start."""
_CHECK_PAUSE_S = 0.02  # between two steps of the check, which appends wait for

T = TypeVar("T")
logger = logging.getLogger(__name__)


class LogUnavailable(Exception):
    """The log can't be reached or can't write. Whether an append was written is unknown: retry it with the same event
    ids."""


class _Proposal(NamedTuple):
    """A caller's append that waits for its commit. `draft` adds it to the commit's draft, and returns the job or raises
    Refused."""

    event_ids: list[str]
    draft: Callable[[Draft, datetime], FineTuningJob]
    done: asyncio.Future[FineTuningJob]


class LiveJobs(NamedTuple):
    position: int
    jobs: list[FineTuningJob]


Outcome = FineTuningJob | Refused | ExpectedVersionError | LogUnavailable


class EventLog:
    """Every method is a coroutine for one event loop; arguments and results pickle. The log owns the store.

    An event id that was appended before is not appended again, so every append may be retried. An append that added
    nothing leaves no trace: its retry is decided anew.
    """

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="event-log")  # all store calls, one at a time
        self._in_background = ThreadPoolExecutor(1, thread_name_prefix="event-log-snapshot")
        self._damage_reported = 0
        self._jobs = restored(store) or Jobs()
        self._snapshot_position = self._jobs.position
        self._jobs.adopt(self._replayed())
        self._json: dict[str, tuple[int, bytes]] = {}
        self._bell = Bell()
        self._proposals: list[_Proposal] = []
        self._committing: asyncio.Task[None] | None = None
        self._in_doubt = False
        self._closing = threading.Event()
        through = self._jobs.position  # later events are written by this process and need no check
        self._checking = threading.Thread(target=self._check, args=(through,), name="event-log-check", daemon=True)
        self._checking.start()
        self._snapshot_if_due()

    async def submit(
        self, job_id: str, event: JobSubmitted, event_id: str, max_live_jobs: int, *, retried: bool = False
    ) -> FineTuningJob:
        """Begins a job and returns it. If the idempotency key was used before, returns that job. It does so, too, if
        the request digest was used within the last minute and the sender says that it has `retried`, or that job was
        not `answered`.

        Raises Refused (`idempotency_key_reused` if that job's config differs, `too_many_jobs` if `max_live_jobs` are
        unfinished, `job_exists`) or LogUnavailable.
        """
        new = _new(event, event_id)
        return await self._propose(
            [event_id], lambda draft, time: draft.submit(job_id, new, max_live_jobs, time, retried=retried)
        )

    async def answered(self, job_id: str) -> None:
        """Notes that the answer to the job's submit was delivered: from now on an identical request makes a new job.

        Kept in memory only: after a restart, an identical request within the minute gets the same job.
        """
        self._jobs.answer(job_id)

    async def append(
        self, job_id: str, events: list[Event], event_ids: list[str], expected_version: int | None = None
    ) -> FineTuningJob:
        """Appends events to a job, all or none, and returns the job after them. An event that changes nothing is not
        appended.

        Raises Refused, ExpectedVersionError (if `expected_version` is given and is not that of the stream) or
        LogUnavailable.
        """
        new = [_new(event, event_id) for event, event_id in zip(events, event_ids, strict=True)]
        return await self._propose(event_ids, lambda draft, time: draft.append(job_id, new, expected_version, time))

    async def job(self, job_id: str) -> FineTuningJob:
        """The job. Raises Refused (`unknown_job`, `job_damaged`), as every method does that asks for one job."""
        return self._job(job_id)

    async def job_with_key(self, idempotency_key: str) -> FineTuningJob | None:
        """The job that was submitted with the key; None while there is none. Raises Refused `job_damaged`."""
        job_id = self._jobs.with_key(idempotency_key)
        return None if job_id is None else self._job(job_id)

    async def job_json(self, job_id: str) -> bytes:
        """`job(job_id).wire_json()`, encoded once per version."""
        job = self._job(job_id)
        version, encoded = self._json.get(job_id, (None, b""))
        if version != job.version:
            encoded = job.wire_json()
            if len(self._json) >= _CACHED_JSON:
                self._json.pop(next(iter(self._json)))
            self._json[job_id] = job.version, encoded
        return encoded

    async def jobs_json(self, job_ids: Sequence[str]) -> list[bytes | Refused]:
        """`job_json` of each job, or the Refused that it raises."""
        found: list[bytes | Refused] = []
        for job_id in job_ids:
            try:
                found.append(await self.job_json(job_id))
            except Refused as refusal:
                found.append(refusal)
        return found

    async def jobs(self, limit: int, after: str | None = None) -> tuple[list[FineTuningJob], bool]:
        """Up to `limit` jobs older than `after`, newest first, and whether there are more.

        Raises Refused `unknown_after`.
        """
        try:
            return self._jobs.page(limit, after)
        except KeyError:
            raise Refused("unknown_after", f"after: there is no job {after!a} in this list") from None

    async def live_jobs(self) -> LiveJobs:
        """Jobs without an outcome, oldest first, and the log's position that they are as of."""
        return LiveJobs(self._jobs.position, self._jobs.live())

    async def read(self, job_id: str, after_version: int = -1, limit: int = _PAGE) -> list[Recorded]:
        """A job's history in order, at most a thousand events a call. Empty for an unknown job."""
        self._jobs.check(job_id)
        try:
            return await self._read(lambda: self._store.read_stream(job_id, after_version, min(limit, _PAGE)))
        except JobDamagedError as error:
            logger.error("%s", error)  # noqa: TRY400  -- where it was raised tells nothing
            self._jobs.damage(job_id, str(error))
            self._jobs.check(job_id)
            raise

    async def subscribe(self, after_position: int, limit: int = _PAGE, wait_s: float = 0) -> list[Recorded]:
        """Events of all jobs after `after_position`, at most a thousand a call; waits up to `wait_s` for the first.

        Empty when time is up. Damaged ones are left out.
        """
        reached = after_position
        while self._jobs.position > reached or await self._bell.heard(_ANY, wait_s):
            reached = self._jobs.position
            if page := await self._read(lambda: self._store.read_all(after_position, min(limit, _PAGE))):
                return page
        return []

    async def wait(self, job_id: str, after_version: int, wait_s: float) -> FineTuningJob:
        """The job once its version is above `after_version`, or as it is when `wait_s` have passed.

        Raises Refused `unknown_job`.
        """
        if self._job(job_id).version <= after_version:
            await self._bell.heard(job_id, wait_s)
        return self._job(job_id)

    async def backup(self, file: str) -> None:
        """Copies the log, as of a moment before this returns, into a new file. Appends go on meanwhile.

        Raises FileExistsError, OSError or LogUnavailable.
        """
        try:
            await asyncio.to_thread(self._store.backup, Path(file))
        except StoreFailedError as error:
            raise LogUnavailable(f"the event log can't be copied: {error}") from error

    async def close(self) -> None:
        """Commits the appends that are waiting, then closes the store."""
        self._closing.set()
        if self._committing is not None:
            await self._committing
        await asyncio.to_thread(self._checking.join)
        await asyncio.to_thread(self._in_background.shutdown)
        await self._in_thread(self._store.close)
        self._thread.shutdown()

    def _job(self, job_id: str) -> FineTuningJob:
        self._jobs.check(job_id)
        job = self._jobs.get(job_id)
        if job is None:
            raise Refused("unknown_job", f"there is no job {ascii(job_id)[1:-1]}")
        return job

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _read(self, read: Callable[[], list[Recorded]]) -> list[Recorded]:
        def read_and_report() -> list[Recorded]:
            history = read()
            self._report_damage()
            return history

        try:
            return await self._in_thread(read_and_report)
        except StoreFailedError as error:
            raise LogUnavailable(f"the event log can't be read: {error}") from error

    def _propose(
        self, event_ids: list[str], draft: Callable[[Draft, datetime], FineTuningJob]
    ) -> asyncio.Future[FineTuningJob]:
        done: asyncio.Future[FineTuningJob] = asyncio.get_running_loop().create_future()
        self._proposals.append(_Proposal(event_ids, draft, done))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_until_idle())
        return done

    async def _commit_until_idle(self) -> None:
        while self._proposals:
            batch, self._proposals = self._proposals, []
            for proposal, outcome in zip(batch, await self._outcomes(batch), strict=True):
                _settle(proposal.done, outcome)
        self._committing = None

    async def _outcomes(self, batch: list[_Proposal]) -> Sequence[Outcome]:
        try:
            draft, outcomes = await self._in_thread(lambda: self._commit(batch))
        except Exception as error:  # whatever it was, the callers must not wait for ever
            logger.exception("the event log could not commit")
            return [LogUnavailable(f"the event log could not commit: {error}")] * len(batch)
        self._adopt(draft)
        return outcomes

    def _commit(self, batch: list[_Proposal]) -> tuple[Draft, list[Outcome]]:
        """Runs in the store's thread. Until it returns, the event loop only reads `_jobs`."""
        draft = self._recovered() if self._in_doubt else Draft(self._jobs)
        draft.know(self._store.find([event_id for proposal in batch for event_id in proposal.event_ids]))
        self._report_damage()
        time = max(datetime.now(UTC), draft.time or _EPOCH)  # never backwards, whatever the clock does
        outcomes = [_try(proposal, draft, time) for proposal in batch]
        if draft.events:
            self._in_doubt = True
            self._store.append(draft.events)
        self._in_doubt = False
        return draft, outcomes

    def _recovered(self) -> Draft:
        """After a failed commit: reopens the store and folds those of the commit's events that are on disk."""
        self._store.reopen()
        return self._replayed()

    def _replayed(self) -> Draft:
        """Folds the events after those in memory. Logs the kinds that this version can't read, and stops
        serving jobs that begin with one."""
        draft = Draft(self._jobs)
        unknown = Counter[str]()
        while page := self._store.read_all(draft.position, _PAGE):
            draft.replay(page)
            for recorded in page:
                if isinstance(recorded.event, UnknownEvent):
                    unknown[recorded.event.kind] += 1
                    if recorded.version == 0:  # then nothing is known of the job; elsewhere the fold ignores them
                        why = f"this version of Tunewright can't read its first event, {recorded.event.kind}"
                        self._jobs.not_understood(recorded.job_id, why)
        for kind, count in unknown.items():
            logger.warning(
                "this version of Tunewright can't read events of type %s and ignores them (%d in all). A newer version "
                "has probably written them: run that one, or jobs may be shown and handled as if these events had not "
                "happened",
                kind,
                count,
            )
        draft.position = max(draft.position, self._store.last_position())  # beyond damaged ones at the end
        self._report_damage()
        if lost := [damage for damage in self._store.damage.values() if damage.position and not damage.job_ids]:
            raise StoreFailedError(
                f"the event at position {lost[0].position} (of {len(lost)}) is damaged and nothing tells whose it is, "
                "so any job could be wrong. Restore a backup of the event log"
            )
        return draft

    def _report_damage(self) -> None:
        """Logs the damage that reads have found, and stops serving those jobs. Runs in the store's thread."""
        found = list(self._store.damage.values())[self._damage_reported :]
        self._damage_reported += len(found)
        for damage in found:
            of = f"of job {' or '.join(damage.job_ids)}" if damage.job_ids else "of an unknown job"
            logger.error("the event at position %d, %s, is damaged: %s", damage.position, of, damage.why)
            for job_id in damage.job_ids:
                self._jobs.damage(job_id, f"event at position {damage.position}: {damage.why}")

    def _check(self, through: int) -> None:
        """Checks the store up to position `through`, in steps between the commits, and reports the damage it finds."""

        def step(position: int) -> int:
            position = self._store.check(position)
            self._report_damage()
            return position

        position = 0
        while position < through and not self._closing.wait(_CHECK_PAUSE_S):
            try:
                position = self._thread.submit(step, position).result()
            except StoreFailedError as error:  # the next start checks again
                logger.error("the event log could not be checked beyond position %d: %s", position, error)  # noqa: TRY400
                return

    def _snapshot_if_due(self) -> None:
        """Writes a snapshot of all jobs, in the background. While any job is damaged none is written, so that the next
        start finds the damage again."""
        if self._jobs.position - self._snapshot_position < _SNAPSHOT_EVENTS or self._jobs.any_damaged():
            return
        self._snapshot_position = position = self._jobs.position
        jobs = self._jobs.all()

        def write() -> None:
            try:
                last = self._thread.submit(self._at, position).result()
                self._store.keep_snapshot(take(jobs, last))
            except (OSError, StoreFailedError, ValueError) as error:  # the next start takes longer, that is all
                logger.warning("no snapshot of the event log was written: %s", error)

        self._in_background.submit(write)

    def _at(self, position: int) -> Recorded:
        """The event at a position. Runs in the store's thread. Raises ValueError if the event is damaged."""
        history = self._store.read_all(position - 1, 1)
        if [recorded.position for recorded in history] != [position]:  # a damaged one is left out
            raise ValueError("its last event can't be read")
        return history[0]

    def _adopt(self, draft: Draft) -> None:
        self._jobs.adopt(draft)
        for job_id in draft.changed:
            self._bell.ring(job_id)
        if draft.changed:
            self._bell.ring(_ANY)
        self._snapshot_if_due()


def _new(event: Event, event_id: str) -> NewEvent:
    try:
        return NewEvent.of(event_id, event)
    except ValueError as error:
        raise Refused("invalid_event", f"{event.type} can't be written as JSON: {error}") from error


def _try(proposal: _Proposal, draft: Draft, time: datetime) -> Outcome:
    try:
        return proposal.draft(draft, time)
    except (Refused, ExpectedVersionError) as refusal:
        return refusal


def _settle(done: "asyncio.Future[FineTuningJob]", outcome: Outcome) -> None:
    if done.done():  # its caller has gone
        return
    if isinstance(outcome, Exception):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)

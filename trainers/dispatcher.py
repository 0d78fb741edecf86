"""Keeps the cluster equal to the log: every live job has a runner, every job that is over has none.

Level-triggered. Each pass reads the live jobs and what runs, and acts on the difference, so a pass may be lost,
repeated or cut short anywhere, and a dispatcher started after any crash simply goes on. One per cluster: see
trainers.dispatcher_actor. It holds nothing that matters: `whys` is a view of its last pass.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from events.actors import EventLogClient
from events.decide import Refused
from events.facts import (
    CancelRequested,
    CheckpointSaved,
    CheckpointsDeleted,
    Event,
    JobAdmitted,
    JobCancelled,
    JobFailed,
    JobPaused,
    JobSubmitted,
    MetricsRecorded,
    PauseRequested,
    RunInterrupted,
)
from events.ids import new_event_id
from events.job import FineTuningJob, evolve
from events.log import EventLog, LogUnavailable
from events.store import Recorded
from trainers import admission
from trainers.admission import Capacity, Waiting
from trainers.cluster import Cluster, Runner
from trainers.errors import AGAIN, InfrastructureError, write_details
from trainers.plan import COMPILED
from trainers.settings import Settings

T = TypeVar("T")
logger = logging.getLogger("tunewright.dispatcher")

TICK_S = 1.0
BETWEEN_PASSES_S = 0.25
"""At least: what arrives in a burst is looked at together."""
_OF_A_RUN = MetricsRecorded | CheckpointSaved | CheckpointsDeleted
"""Events that no pass has to act on."""
SETTLING_TICK_S = 0.2
"""Between passes while a runner is being stopped: a cancelled job should not read `running` longer than it does."""
SHUTTING_DOWN = "the service is being shut down; the job goes on when it is back"
DRAIN_LASTS_S = 600.0
"""Nothing starts for this long after `drain`: a drain that no shutdown follows ends by itself."""


@dataclass(frozen=True)
class Sight:
    """One live job and what the cluster shows of it."""

    job: FineTuningJob
    runner: Runner
    groups: tuple[tuple[str, str], ...]

    @property
    def unsettled(self) -> bool:
        """To be cancelled or paused, or without the runner that the log says it has.

        A run that is to pause ends by itself, at a checkpoint, and data that is being validated may be finished.
        """
        pausing = self.job.pausing and (self.runner.state != "alive" or self.job.status == "queued")
        lost = self.runner.state in ("stopped", "ended") or (
            self.runner.state == "absent" and self.job.status == "running"
        )
        return self.job.cancel_requested or pausing or lost

    @property
    def placed(self) -> bool:
        return any(state == "CREATED" for _, state in self.groups)


class Dispatcher:
    """Acts on the difference between `log` and `cluster`. See the module for its guarantees."""

    def __init__(self, log: EventLog | EventLogClient, cluster: Cluster, settings: Settings) -> None:
        self._log = log
        self._cluster = cluster
        self._settings = settings
        self._whys: dict[str, str] = {}
        self._live: dict[str, FineTuningJob] = {}
        self._position: int | None = None  # as of which `_live` holds; None: the log was not asked yet
        self._settling = False
        self._draining_until = float("-inf")
        self._looks = 0
        self._at_work: list[str] = []  # jobs that trained, at the last look
        # Jobs that are known to have no runner: only this dispatcher starts one, so Ray need not be asked again. With
        # a thousand jobs in line, that is a thousand requests less in each pass.
        self._without_runner: set[str] = set()

    def whys(self) -> dict[str, str]:
        """For each job that waits, why; as of the last pass, at most a second or two old."""
        return self._whys

    async def capacity(self) -> Capacity:
        return await asyncio.to_thread(self._cluster.capacity)

    async def drain(self, timeout_s: float) -> list[str]:
        """Before a shutdown: running jobs stop at a checkpoint, and nothing starts for `DRAIN_LASTS_S`.

        Returns when no job runs any more, or when `timeout_s` have passed: the jobs that still run then. A later
        dispatcher takes all of them up again.
        """
        self._draining_until = time.monotonic() + DRAIN_LASTS_S
        deadline = time.monotonic() + timeout_s
        looked = self._looks
        while time.monotonic() < deadline:
            await asyncio.sleep(SETTLING_TICK_S)
            if self._looks > looked + 1 and not self._at_work:  # a whole pass began after this call
                break
        return self._at_work

    @property
    def _draining(self) -> bool:
        return time.monotonic() < self._draining_until

    async def run(self) -> None:
        """Pass after pass, for ever: at once when something was appended, and every `TICK_S` to watch the cluster.

        A pass that fails is logged and tried again: the causes (log or dashboard restarting) pass, and nothing else
        would look after the jobs meanwhile.
        """
        while True:
            try:
                await self.reconcile()
                await asyncio.sleep(BETWEEN_PASSES_S)
                await self._wait_for_news()
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception("dispatcher pass failed; the next one follows in %s s", TICK_S)
                await asyncio.sleep(TICK_S)

    async def reconcile(self) -> None:
        """One pass."""
        live = await self._live_jobs()
        self._without_runner &= {job.job_id for job in live}
        groups = await asyncio.to_thread(self._cluster.placement_groups) if live else {}
        looks = await asyncio.gather(*(_alone(job.job_id, self._look(job, groups)) for job in live))
        sights = [sight for sight in looks if sight is not None]
        self._looks += 1
        self._at_work = [s.job.job_id for s in sights if s.job.status == "running" and s.runner.state == "alive"]
        unsettled = [sight for sight in sights if sight.unsettled]
        await asyncio.gather(*(_alone(sight.job.job_id, self._settle(sight)) for sight in unsettled))
        rest = [sight for sight in sights if not sight.unsettled]
        await self._pause(rest)
        await asyncio.gather(*(self._free_groups(sight) for sight in rest if not sight.job.admitted))
        whys = {sight.job.job_id: why for sight in sights if (why := _doing(sight)) is not None}
        whys |= await self._start_runners(rest)
        whys |= await self._admit(rest)
        self._whys = whys
        self._settling = bool(unsettled) or any(sight.job.pausing and sight.job.status == "running" for sight in rest)

    async def _live_jobs(self) -> list[FineTuningJob]:
        """Jobs without an outcome, oldest first, as the log has them now.

        The log is asked for them once; from then on their events are folded here as well. Asking in each pass would
        keep the log from its appends while it pickles every job in line.
        """
        if self._position is None:
            self._position, jobs = await self._log.live_jobs()
            self._live = {job.job_id: job for job in jobs}
        while await self._news(self._position, wait_s=0):
            pass
        return list(self._live.values())

    async def _news(self, position: int, wait_s: float) -> list[Recorded]:
        """What was appended after `position`, folded into `_live`; waits up to `wait_s` for the first of it."""
        news = await self._log.subscribe(position, wait_s=wait_s)
        for recorded in news:
            self._position = recorded.position
            known = self._live.get(recorded.job_id)
            if known is None and not isinstance(recorded.event, JobSubmitted):
                continue  # of a job that is over
            job = evolve(known, recorded)
            self._live[job.job_id] = job
            if job.over:
                del self._live[job.job_id]
        return news

    async def _look(self, job: FineTuningJob, groups: dict[str, list[tuple[str, str]]]) -> Sight:
        runner = Runner("absent")
        if job.job_id not in self._without_runner:
            runner = await asyncio.to_thread(self._cluster.runner, job.job_id)
            if runner.state == "absent":
                self._without_runner.add(job.job_id)
        return Sight(job, runner, tuple(groups.get(job.job_id, ())))

    async def _settle(self, sight: Sight) -> None:
        """A job that is to be cancelled, or whose runner is gone, though the log calls it live."""
        job_id = sight.job.job_id
        if sight.runner.state == "alive":
            await asyncio.to_thread(self._cluster.stop_runner, job_id)
            return
        await self._free_groups(sight)
        if sight.groups:
            return  # the next pass sees whether they are gone
        job = await self._log.job(job_id)  # the runner may have appended its outcome just before it ended
        if job.finished_at is not None:
            return
        if job.cancel_requested:
            await self._end(job, JobCancelled())
        elif job.pausing:
            if sight.runner.state == "absent" or await asyncio.to_thread(self._cluster.forget_runner, job_id):
                await self._append(job, JobPaused(attempt=job.attempt))
        elif sight.runner.state == "stopped":
            # `ray job stop`, or the dashboard's stop button: somebody wanted it to end.
            await self._end(job, CancelRequested(), JobCancelled())
        else:
            await self._interrupted(job, sight.runner)

    async def _end(self, job: FineTuningJob, *events: Event) -> None:
        """In place of its runner, which is gone: what nobody but the job's own runs could use goes with it."""
        compiled = self._settings.job_dir(job.job_id) / COMPILED
        await asyncio.to_thread(shutil.rmtree, compiled, ignore_errors=True)
        await self._append(job, *events)

    async def _free_groups(self, sight: Sight) -> None:
        """Free what a runner or an attempt that is gone left behind; nobody else will."""
        for group_id, _ in sight.groups:
            await asyncio.to_thread(self._cluster.remove_placement_group, group_id)

    async def _pause(self, sights: list[Sight]) -> None:
        """What runs where it can't stay stops at a checkpoint, to go on elsewhere or later."""
        running = [sight.job for sight in sights if sight.job.status == "running" and not sight.job.pausing]
        if not running:
            return
        moving = await asyncio.to_thread(self._cluster.on_draining_nodes)
        for job in running:
            if self._draining:
                await self._append(job, PauseRequested(by="shutdown"))
            elif job.job_id in moving:
                await self._append(job, PauseRequested(by="node_drain"))

    async def _interrupted(self, job: FineTuningJob, runner: Runner) -> None:
        if runner.state == "absent":
            reason = "the cluster was restarted while it ran"
        else:
            reason = f"its runner ended without an outcome: {_gist(runner.message)}"
        if job.interruptions >= job.max_restarts:
            death = InfrastructureError(
                "runner_died",
                f"{reason}; it was restarted {job.interruptions} times, which is all --max-restarts allows",
                suggestion=AGAIN,
            )
            # All that Ray knows of the end, the last output included.
            details = await asyncio.to_thread(write_details, runner.message, self._settings.job_dir(job.job_id))
            await self._end(job, JobFailed(error=death.error, error_path=details))
            return
        if runner.state == "absent" or await asyncio.to_thread(self._cluster.forget_runner, job.job_id):
            await self._append(job, RunInterrupted(attempt=job.attempt, reason=reason))

    async def _start_runners(self, sights: list[Sight]) -> dict[str, str]:
        """Start what has no runner, oldest first, while few enough runners wait. Returns why the others wait."""
        waiting = sum(s.runner.state == "alive" and s.job.status in ("validation", "queued") for s in sights)
        whys: dict[str, str] = {}
        behind = 0
        for sight in sights:
            if sight.runner.state != "absent" or sight.job.paused:
                continue
            if self._draining:
                whys[sight.job.job_id] = SHUTTING_DOWN
                continue
            if waiting < self._settings.max_waiting_runners:
                waiting += 1
                self._without_runner.discard(sight.job.job_id)
                start = asyncio.to_thread(self._cluster.start_runner, sight.job.job_id, self._settings.as_env())
                await _alone(sight.job.job_id, start)
                whys[sight.job.job_id] = "its runner is starting"
            else:
                turn = "to be started again" if sight.job.validated else "to be validated"
                whys[sight.job.job_id] = f"waits for its turn {turn}; {waiting + behind} jobs ahead"
                behind += 1
        return whys

    async def _admit(self, sights: list[Sight]) -> dict[str, str]:
        """Admit whoever is next, of the jobs whose runner is there: one without would block the line for nothing."""
        queue = [
            Waiting(s.job.job_id, s.job.resources, admitted=s.job.admitted, placed=s.placed)
            for s in sights
            if s.job.status == "queued"
            and not s.job.pausing
            and s.runner.state == "alive"
            and s.job.resources is not None
        ]
        if self._draining:
            return {waiting.job_id: SHUTTING_DOWN for waiting in queue}
        if not queue:
            return {}
        decision = admission.decide(queue, (await self.capacity()).free)
        by_id = {s.job.job_id: s.job for s in sights}
        for job_id in decision.admit:
            await self._append(by_id[job_id], JobAdmitted())
        return decision.whys

    async def _append(self, job: FineTuningJob, *events: Event) -> None:
        try:
            await self._log.append(job.job_id, list(events), [new_event_id() for _ in events])
        except Refused as refusal:
            # The job moved on between this pass's look and now; the next pass looks again.
            logger.info("%s: %s", job.job_id, refusal)

    async def _wait_for_news(self) -> None:
        """Return when something was appended that a pass could act on, or when the cluster is due for a look."""
        deadline = time.monotonic() + (SETTLING_TICK_S if self._settling else TICK_S)
        while self._position is not None and (left := deadline - time.monotonic()) > 0:
            news = await self._news(self._position, wait_s=left)
            if any(
                not isinstance(recorded.event, MetricsRecorded | CheckpointSaved | CheckpointsDeleted)
                for recorded in news
            ):
                return


def _doing(sight: Sight) -> str | None:
    """What is being done about a job that waits, where that is not for a decision of this dispatcher's."""
    if sight.job.cancel_requested or sight.job.pausing:
        return None  # the log says that
    if sight.runner.state == "ended":
        return "its runner ended without an outcome and is being replaced"
    if sight.job.status == "validation" and sight.runner.state == "alive":
        return "its model is being fetched and its data read, checked and tokenised; its log says how far that is"
    return None


async def _alone(job_id: str, work: Coroutine[Any, Any, T]) -> T | None:
    """A job for which Ray fails must not keep a pass from all the others: None then, and the next pass tries again."""
    try:
        return await work
    except (LogUnavailable, asyncio.CancelledError):
        raise
    except Exception:
        logger.exception("%s: this pass could not act on it", job_id)
        return None


def _gist(message: str) -> str:
    """Ray's account of a Ray Job's end is a sentence, then the last lines it printed: its first and last line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return "no message from Ray"
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"

"""Makes the cluster match the log: live jobs get a runner, and jobs that are over soon have none.

Level-triggered: each pass compares the live jobs with what runs, and acts on the difference. So a pass may be lost,
repeated or cut short anywhere, and a dispatcher that is started after a crash simply goes on. There is one per cluster
(see trainers.dispatching.dispatcher_actor). It has no state that could be lost: `whys` is derived from its last pass.
"""

import asyncio
import logging
import re
import time
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from events.actors import AnyLog, LogQueueClient
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
from events.log import LogUnavailable
from events.log_queue import LogQueue
from events.store import Recorded
from trainers.dispatching import admission, leftovers
from trainers.dispatching.admission import Capacity, Waiting
from trainers.dispatching.cluster import Cluster, Runner
from trainers.dispatching.last_line import last_line
from trainers.dispatching.sight import Sight
from trainers.errors import AGAIN, InfrastructureError, write_details
from trainers.settings import Settings

T = TypeVar("T")
logger = logging.getLogger("tunewright.dispatcher")

TICK_S = 1.0
"""Longest time between two passes, when no event arrives."""
BETWEEN_PASSES_S = 0.25
"""Shortest time between two passes: events that arrive in a burst are handled together."""
_OF_A_RUN = MetricsRecorded | CheckpointSaved | CheckpointsDeleted
"""Events that no pass has to act on."""
SETTLING_TICK_S = 0.2
"""As TICK_S, while a runner is being stopped: a cancelled job should not read `running` longer than it runs."""
PATIENCE = 10
"""Passes in a row that may fail to act on a job before it loses its place in the line: a short failure of Ray must not
change the order, and no job may wait for ever behind one for which Ray always fails."""
SAY_S = 5.0
"""Time-out for the log queue to take a line; the pass waits for it."""
LEAVING_S = 60.0
"""Seconds after which the runner of a job that is over is stopped. It normally ends by itself within a few."""
SHUTTING_DOWN = "the service is being shut down; the job goes on when it is back"
DRAIN_LASTS_S = 600.0
"""Nothing starts for this long after `drain`: a drain that no shutdown follows ends by itself."""


class Dispatcher:
    """Acts on the difference between `log` and `cluster`. The module's docstring has its guarantees."""

    def __init__(self, log: AnyLog, lines: LogQueue | LogQueueClient, cluster: Cluster, settings: Settings) -> None:
        self._log = log
        self._lines = lines
        self._cluster = cluster
        self._settings = settings
        self._whys: dict[str, str] = {}
        self._live: dict[str, FineTuningJob] = {}
        self._ending: dict[str, tuple[FineTuningJob, float]] = {}  # over, since when; they may still have runners
        self._looked_back = False  # for groups of jobs that were over before this dispatcher started
        self._position: int | None = None  # log position of `_live`; None: the log was not asked yet
        self._settling = False
        self._draining_until = float("-inf")
        self._looks = 0  # how often all live jobs were looked at
        self._trouble: str | None = None  # why the last pass failed
        self._at_work: list[str] = []  # jobs that trained or could start to, at the last look
        self._failed: set[str] = set()  # jobs that this pass could not act on
        self._failures: dict[str, int] = {}  # by job: failed passes in a row, up to the last one
        # Jobs that are known to have no runner. Only this dispatcher starts one, so Ray need not be asked again: with a
        # thousand jobs in line, that saves a thousand requests in each pass.
        self._without_runner: set[str] = set()

    def whys(self) -> dict[str, str]:
        """By job, why it waits, as of the last pass (at most a second or two ago)."""
        return self._whys

    async def capacity(self) -> Capacity:
        return await asyncio.to_thread(self._cluster.capacity)

    async def drain(self, timeout_s: float) -> list[str]:
        """Prepares a shutdown: running jobs stop at a checkpoint, admitted jobs go back in line, and nothing starts for
        `DRAIN_LASTS_S`.

        Returns once no job runs any more, or after `timeout_s`, the jobs that still run. After the restart the next
        dispatcher takes all jobs up again. Raises LogUnavailable if no pass has found out in that time what runs.
        """
        self._draining_until = time.monotonic() + DRAIN_LASTS_S
        deadline = time.monotonic() + timeout_s
        looked = self._looks
        while time.monotonic() < deadline:
            await asyncio.sleep(SETTLING_TICK_S)
            if self._looks > looked + 1 and not self._at_work:  # a whole pass began after this call
                return []
        if not self._at_work:
            reason = self._trouble or f"a whole look takes longer than {timeout_s:g} s"
            raise LogUnavailable(f"nobody knows what runs: {reason}")
        return self._at_work

    @property
    def _draining(self) -> bool:
        return time.monotonic() < self._draining_until

    async def run(self) -> None:
        """Makes passes for ever: one when an event was appended, and one every `TICK_S` to watch the cluster.

        A pass that fails is logged, and the next one follows: the causes (the log or the dashboard restarts) are
        temporary, and nothing else looks after the jobs.
        """
        while True:
            try:
                await self.reconcile()
                self._trouble = None
                await asyncio.sleep(BETWEEN_PASSES_S)
                await self._wait_for_news()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._trouble = str(error) or type(error).__name__
                logger.exception("dispatcher pass failed; the next one follows in %s s", TICK_S)
                await asyncio.sleep(TICK_S)

    async def reconcile(self) -> None:
        """One pass."""
        live = await self._live_jobs()
        self._without_runner &= {job.job_id for job in live}
        self._failed = set()
        wanted = live or self._ending or not self._looked_back
        groups = await asyncio.to_thread(self._cluster.placement_groups) if wanted else {}
        await self._look_back(groups)
        ending = list(self._ending.values())
        await asyncio.gather(*(self._alone(job.job_id, self._see_off(job, since, groups)) for job, since in ending))
        sights = await asyncio.gather(*(self._look(job, groups) for job in live))
        self._looks += 1
        self._at_work = [sight.job.job_id for sight in sights if sight.at_work]
        unsettled = [sight for sight in sights if sight.unsettled]
        await asyncio.gather(*(self._alone(sight.job.job_id, self._settle(sight)) for sight in unsettled))
        rest = [sight for sight in sights if not sight.unsettled]
        await self._pause(rest)
        stale = [sight for sight in rest if not sight.job.admitted]
        await asyncio.gather(*(self._alone(sight.job.job_id, self._free_groups(sight)) for sight in stale))
        whys = {sight.job.job_id: why for sight in sights if (why := sight.doing) is not None}
        coming = await self._start_runners(sights, whys)
        await self._admit(sights, coming, whys)
        self._whys = whys
        self._failures = {job_id: self._failures.get(job_id, 0) + 1 for job_id in self._failed}
        self._settling = bool(unsettled) or any(sight.job.pausing and sight.job.status == "running" for sight in rest)

    async def _live_jobs(self) -> list[FineTuningJob]:
        """Jobs without an outcome, oldest first, as the log has them now.

        They are fetched once; from then on their events are folded here, too. Fetching them in each pass would block
        the log's appends while it pickles every job in line.
        """
        if self._position is None:
            self._position, jobs = await self._log.live_jobs()
            self._live = {job.job_id: job for job in jobs}
        while await self._news(self._position, wait_s=0):
            pass
        return list(self._live.values())

    async def _news(self, position: int, wait_s: float) -> list[Recorded]:
        """Folds the events after `position` into `_live`, and returns them. Waits up to `wait_s` for the first one."""
        news = await self._log.subscribe(position, wait_s=wait_s)
        for recorded in news:
            self._position = recorded.position
            known = self._live.get(recorded.job_id)
            if known is None and not isinstance(recorded.event, JobSubmitted):
                continue  # the job is over, or damaged
            job = evolve(known, recorded)
            self._live[job.job_id] = job
            if job.over:
                del self._live[job.job_id]
                if job.job_id not in self._without_runner:
                    self._ending[job.job_id] = job, time.monotonic()
        return news

    async def _look(self, job: FineTuningJob, groups: dict[str, list[tuple[str, str]]]) -> Sight:
        runner = Runner("absent")
        if job.job_id not in self._without_runner:
            asked = await self._alone(job.job_id, asyncio.to_thread(self._cluster.runner, job.job_id))
            runner = asked or Runner("unknown")
            if runner.state == "absent":
                self._without_runner.add(job.job_id)
        return Sight(job, runner, tuple(groups.get(job.job_id, ())))

    async def _look_back(self, groups: Mapping[str, object]) -> None:
        """In the first pass: jobs that are over but still have a placement group are treated as if they had just
        ended."""
        if self._looked_back:
            return
        for name in groups.keys() - self._live.keys():
            try:
                job = await self._log.job(name)
            except Refused:  # not a job's group, or the job is damaged
                continue
            self._ending[name] = job, time.monotonic()
        self._looked_back = True

    async def _see_off(self, job: FineTuningJob, since: float, groups: dict[str, list[tuple[str, str]]]) -> None:
        """Frees what a job that is over still holds, once its runner has ended; stops a runner that doesn't. Deletes
        the job's leftovers, too: the runner may have been killed before it did."""
        sight = await self._look(job, groups)
        if sight.runner.state == "alive":
            if time.monotonic() - since >= LEAVING_S:
                await asyncio.to_thread(self._cluster.stop_runner, job.job_id)
        elif sight.runner.state != "unknown":
            await self._free_groups(sight)
            if not sight.groups:
                await self._clear(job)
                del self._ending[job.job_id]

    async def _settle(self, sight: Sight) -> None:
        """Ends the runner of a job that is to be cancelled or paused; once it is gone, records what follows."""
        job_id = sight.job.job_id
        if sight.runner.state == "alive":
            await asyncio.to_thread(self._cluster.stop_runner, job_id)
            return
        await self._free_groups(sight)
        if sight.groups:
            return  # the next pass sees whether they are gone
        try:
            job = await self._log.job(job_id)  # the runner may have appended its outcome just before it ended
        except Refused as refusal:  # the job was found to be damaged since
            logger.warning("%s is left alone from now on: %s", job_id, refusal)
            self._live.pop(job_id, None)
            return
        if job.finished_at is None:
            await self._record(job, sight)

    async def _record(self, job: FineTuningJob, sight: Sight) -> None:
        """Records what follows for a live job of which nothing runs any more."""
        job_id = job.job_id
        if job.cancel_requested:
            await self._end(job, JobCancelled())
        elif job.pausing:
            if sight.runner.state == "absent" or await asyncio.to_thread(self._cluster.forget_runner, job_id):
                await self._append(job, JobPaused(attempt=job.attempt))
        elif sight.runner.state == "stopped":
            # By `ray job stop`, or the dashboard's stop button: it counts as a cancellation.
            if await self._append(job, CancelRequested()) is not None:  # before what resuming needs is deleted
                await self._end(job, JobCancelled())
        elif sight.runner.state == "absent" and job.admitted and job.status == "queued":
            # The cluster went down after the admission and before the run: the job goes back in line.
            await self._append(job, PauseRequested(by="shutdown"), JobPaused(attempt=job.attempt))
        else:
            await self._interrupted(job, sight.runner)

    async def _end(self, job: FineTuningJob, outcome: Event) -> None:
        """Records the outcome in place of the runner, which is gone, and deletes the job's leftovers. The caller has
        made sure that the job has no other outcome."""
        await self._clear(job)
        if (ended := await self._append(job, outcome)) is not None:
            await self._clear(ended)

    async def _clear(self, job: FineTuningJob) -> None:
        await asyncio.to_thread(leftovers.clear, job, self._settings.job_dir(job.job_id))

    async def _free_groups(self, sight: Sight) -> None:
        """Frees placement groups that a lost runner or attempt has left; nothing else would."""
        for group_id, _ in sight.groups:
            await asyncio.to_thread(self._cluster.remove_placement_group, group_id)

    async def _pause(self, sights: list[Sight]) -> None:
        """Asks running jobs to stop at a checkpoint: all of them during a drain, else those on nodes that are drained.
        During a drain admitted jobs are asked, too: they would run as soon as Ray has room for them."""
        admitted = [sight.job for sight in sights if sight.job.admitted and not sight.job.pausing]
        if self._draining:
            for job in admitted:
                await self._append(job, PauseRequested(by="shutdown"))
            return
        running = [job for job in admitted if job.status == "running"]
        if not running:
            return
        moving = await asyncio.to_thread(self._cluster.on_draining_nodes)
        for job in running:
            if job.job_id in moving:
                await self._append(job, PauseRequested(by="node_drain"))

    async def _interrupted(self, job: FineTuningJob, runner: Runner) -> None:
        """Records the loss of a runner, and fails the job if that was one too many.

        The loss is recorded before another runner can be started: it is what separates their tenures. However often a
        pass gets here, a loss is counted once, by its event id.
        """
        if runner.state == "absent":
            lost, reason = f"attempt-{job.attempt}", "the cluster was restarted while it ran"
        else:
            lost = f"runner-{runner.started_ms}"
            reason = f"its runner ended without an outcome: {_gist(runner.message)}"
        counted: FineTuningJob | None = job
        if job.interruptions <= job.max_restarts:  # else an earlier dispatcher has recorded it, but not the failure
            interruption = RunInterrupted(attempt=job.attempt, reason=reason)
            counted = await self._append(job, interruption, event_ids=[f"{job.job_id}-{lost}-lost"])
        if counted is None:
            return
        if counted.interruptions > counted.max_restarts:
            death = InfrastructureError(
                "runner_died",
                f"{reason}; it was restarted {counted.max_restarts} times, which is all --max-restarts allows",
                suggestion=AGAIN,
            )
            told = runner.message or reason  # Ray's message includes the last lines of output
            details = await asyncio.to_thread(write_details, told, self._settings.job_dir(job.job_id))
            await self._end(job, JobFailed(error=death.error, error_path=details))
        elif runner.state == "ended":
            await asyncio.to_thread(self._cluster.forget_runner, job.job_id)

    async def _start_runners(self, sights: list[Sight], whys: dict[str, str]) -> set[str]:
        """Starts runners for the jobs that have none, oldest first, and notes in `whys` why the others wait.

        A job gets one if fewer than `max_waiting_runners` runners of older jobs wait, and fewer than twice as many in
        all. Returns the jobs whose runner is coming: it was started, is about to be replaced, or may exist although Ray
        gave no answer. Jobs for which that failed are among them at first: see PATIENCE.
        """
        most, in_all = self._settings.max_waiting_runners, sum(sight.waiting for sight in sights)
        coming: set[str] = set()
        waiting = behind = 0
        for sight in sights:
            job_id = sight.job.job_id
            waiting += sight.waiting
            if not (sight.to_be_started or sight.returning or sight.unseen):
                continue
            if self._draining:
                if sight.to_be_started:
                    whys[job_id] = SHUTTING_DOWN
            elif waiting < most and in_all < 2 * most:
                in_all += 1  # also on failure: if Ray fails for all, not every job in line shall be tried
                if sight.to_be_started:
                    await self._alone(job_id, self._start_runner(job_id))
                if job_id not in self._failed or self._failures.get(job_id, 0) < PATIENCE:
                    waiting += 1
                    coming.add(job_id)
                if sight.to_be_started:
                    whys[job_id] = "its runner is starting"
            elif sight.to_be_started:
                turn = "to be started again" if sight.job.validated else "to be validated"
                whys[job_id] = f"waits for its turn {turn}; {waiting + behind} jobs ahead"
                behind += 1
        return coming

    async def _start_runner(self, job_id: str) -> None:
        self._without_runner.discard(job_id)
        await asyncio.to_thread(self._cluster.start_runner, job_id, self._settings.as_env())

    async def _admit(self, sights: list[Sight], coming: set[str], whys: dict[str, str]) -> None:
        """Admits the jobs whose turn it is and whose runner is there, and notes in `whys` why the others wait. A job
        whose runner is `coming` keeps its place. Other jobs without a runner are left out: they would only block the
        line."""
        line = [
            Waiting(s.job.job_id, s.job.resources, admitted=s.job.admitted, placed=s.placed, ready=s.waiting)
            for s in sights
            if s.job.resources is not None and s.job.validated and (s.waiting or s.job.job_id in coming)
        ]
        ready = {waiting.job_id for waiting in line if waiting.ready}
        if self._draining:
            whys |= dict.fromkeys(ready, SHUTTING_DOWN)
        elif ready:
            decision = admission.decide(line, (await self.capacity()).free)
            by_id = {s.job.job_id: s.job for s in sights}
            for job_id in decision.admit:
                await self._append(by_id[job_id], JobAdmitted())
            whys |= decision.whys

    async def _append(
        self, job: FineTuningJob, *events: Event, event_ids: list[str] | None = None
    ) -> FineTuningJob | None:
        """The job after the events. None: the log refused them, since the job has changed after this pass read it; the
        next pass looks again."""
        source = f"{events[-1].type}-{event_ids[-1] if event_ids else job.version}"
        if (line := last_line(job, events[-1])) is not None:
            await self._say(job, line, source)
        try:
            return await self._log.append(job.job_id, list(events), event_ids or [new_event_id() for _ in events])
        except Refused as refusal:
            logger.info("%s: %s", job.job_id, refusal)
            if line is not None:
                await self._say(job, f"disregard the line above: {refusal}", f"{source}-refused")
            return None

    async def _say(self, job: FineTuningJob, line: str, source: str) -> None:
        """Writes a line to the job's log, once for each `source`. To be called before the event is appended: a reader
        may stop at the event. A failure is only logged: a job must be able to end without the line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        try:
            async with asyncio.timeout(SAY_S):
                await self._lines.append(job.job_id, source, 0, [(now, line)])
        except (LogUnavailable, OSError) as error:
            logger.warning("%s: not in its log: %s (%s)", job.job_id, line, str(error) or "no answer in time")

    async def _alone(self, job_id: str, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of one job's work. If Ray fails for the job, that is logged, and None returned: the pass goes on
        with the other jobs, and the next one tries again."""
        try:
            return await work
        except (LogUnavailable, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("%s: this pass could not act on it", job_id)
            self._failed.add(job_id)
            return None

    async def _wait_for_news(self) -> None:
        """Returns when an event was appended that a pass may have to act on, or when it is time for the next pass."""
        deadline = time.monotonic() + (SETTLING_TICK_S if self._settling else TICK_S)
        while self._position is not None and (left := deadline - time.monotonic()) > 0:
            news = await self._news(self._position, wait_s=left)
            if any(not isinstance(recorded.event, _OF_A_RUN) for recorded in news):
                return


def _gist(message: str) -> str:
    """Ray's message about the end of a Ray Job in one clause. The message is a sentence and the last lines of output;
    the result is the sentence and the last line, or, if the process was killed, the signal."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return "no message from Ray"
    told = lines[0].partition(", last available logs")[0].removesuffix(".")
    if killed := re.search(r"exit code -(\d+)", told):
        return f"it was killed by signal {killed[1]}"
    return told if len(lines) == 1 else f"{told}: {lines[-1].removesuffix('.')}"

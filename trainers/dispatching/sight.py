"""One job as a pass of the dispatcher sees it: what the log and the cluster say, and what has to be done."""

from dataclasses import dataclass

from events.job import FineTuningJob
from trainers.dispatching.cluster import Runner


@dataclass(frozen=True)
class Sight:
    """One live job, its runner, and its placement groups as (id, state) pairs."""

    job: FineTuningJob
    runner: Runner
    groups: tuple[tuple[str, str], ...]

    @property
    def unsettled(self) -> bool:
        """Whether its end, a pause or the loss of its runner has to be brought about or recorded.

        A live runner is not stopped for a pause while it trains or validates data: a run ends by itself at a
        checkpoint, and a validation may be finished.
        """
        if self.runner.state == "unknown":
            return False
        pausing = self.job.pausing and (self.runner.state != "alive" or self.job.status == "queued")
        return self.job.cancel_requested or pausing or self._lost or self.runner.state == "stopped"

    @property
    def returning(self) -> bool:
        """Whether its runner is gone, and it gets another as soon as the loss is recorded and Ray has forgotten the old
        runner."""
        gone = self._lost or (self.job.pausing and self.runner.state != "alive")
        return self.unsettled and not self._leaving and gone

    @property
    def unseen(self) -> bool:
        """Whether Ray gave no answer about its runner, so that it may well be waiting in line."""
        return self.runner.state == "unknown" and not self._leaving and not self.placed

    @property
    def to_be_started(self) -> bool:
        return self.runner.state == "absent" and not self.unsettled and not self.job.paused

    @property
    def waiting(self) -> bool:
        """Whether it has a runner that prepares its data or waits for resources."""
        return self.runner.state == "alive" and self.job.status in ("validation", "queued") and not self.unsettled

    @property
    def at_work(self) -> bool:
        """Whether it trains or may start to at any moment: until its runner is gone, Ray may grant an admitted job its
        resources, without asking the dispatcher."""
        asked = self.job.admitted or (self.job.pausing and self.job.status == "queued")
        return self.runner.state in ("alive", "unknown") and asked

    @property
    def placed(self) -> bool:
        return any(state == "CREATED" for _, state in self.groups)

    @property
    def doing(self) -> str | None:
        """Why it waits, unless admission decides that. For the job's `why`."""
        if self.job.cancel_requested or self.job.pausing:
            return None  # the fold sets `why` from the log
        if self.runner.state == "ended":
            return "its runner ended without an outcome and is being replaced"
        if self.runner.state == "unknown" and self.job.status != "running":
            return "Ray doesn't say whether its runner is alive, and is being asked again"
        if self.job.status == "validation" and self.runner.state == "alive":
            return "its model is being fetched and its data read, checked and tokenised; its log shows the progress"
        return None

    @property
    def _leaving(self) -> bool:
        """Whether it gives up its place in the line."""
        return self.job.cancel_requested or self.job.pause_requested

    @property
    def _lost(self) -> bool:
        """Whether its runner is gone and that has yet to be recorded.

        An absent runner matters if the job is admitted: the admission must be withdrawn, or the next runner would train
        at once, whichever job is first in line by then. It also matters after one interruption too many, which has to
        end the job.
        """
        recorded = not self.job.admitted and (self.job.interruptions <= self.job.max_restarts or self.job.paused)
        return self.runner.state == "ended" or (self.runner.state == "absent" and not recorded)

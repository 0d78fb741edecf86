"""What a pass of the dispatcher sees of one job, and what follows from that."""

from dataclasses import dataclass

from events.job import FineTuningJob
from trainers.dispatching.cluster import Runner


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
        if self.runner.state == "unknown":
            return False
        pausing = self.job.pausing and (self.runner.state != "alive" or self.job.status == "queued")
        return self.job.cancel_requested or pausing or self._lost or self.runner.state == "stopped"

    @property
    def returning(self) -> bool:
        """Its runner is gone, and it gets another as soon as that is recorded and Ray has forgotten the old one."""
        gone = self._lost or (self.job.pausing and self.runner.state != "alive")
        return self.unsettled and not self._leaving and gone

    @property
    def unseen(self) -> bool:
        """Ray doesn't say how its runner is: it may well stand in line."""
        return self.runner.state == "unknown" and not self._leaving and not self.placed

    @property
    def to_be_started(self) -> bool:
        return self.runner.state == "absent" and not self.unsettled and not self.job.paused

    @property
    def waiting(self) -> bool:
        """It has a runner, which makes its data ready or waits for resources."""
        return self.runner.state == "alive" and self.job.status in ("validation", "queued") and not self.unsettled

    @property
    def at_work(self) -> bool:
        """It trains, or may begin to at any moment: what it asked Ray for is granted without another word of ours, and
        until its runner is gone."""
        asked = self.job.admitted or (self.job.pausing and self.job.status == "queued")
        return self.runner.state in ("alive", "unknown") and asked

    @property
    def placed(self) -> bool:
        return any(state == "CREATED" for _, state in self.groups)

    @property
    def doing(self) -> str | None:
        """What is being done about a job that waits, where that is not for a decision of the dispatcher's."""
        if self.job.cancel_requested or self.job.pausing:
            return None  # the log says that
        if self.runner.state == "ended":
            return "its runner ended without an outcome and is being replaced"
        if self.runner.state == "unknown" and self.job.status != "running":
            return "Ray doesn't say whether its runner is alive, and is being asked again"
        if self.job.status == "validation" and self.runner.state == "alive":
            return "its model is being fetched and its data read, checked and tokenised; its log shows the progress"
        return None

    @property
    def _leaving(self) -> bool:
        """It gives up its place in the line."""
        return self.job.cancel_requested or self.job.pause_requested

    @property
    def _lost(self) -> bool:
        """Gone, with more to record than that. An admission goes with the runner it was given to: the next one would
        train without asking, whoever is first in line by then. And one loss too many is to be the end of the job."""
        recorded = not self.job.admitted and (self.job.interruptions <= self.job.max_restarts or self.job.paused)
        return self.runner.state == "ended" or (self.runner.state == "absent" and not recorded)

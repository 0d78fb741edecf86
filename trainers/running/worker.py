"""The training function that Ray Train runs on every worker, and its reports to the log.

`train_worker` connects `TorchTrainer` to `trainers.training.recipe`: it captures the process's output, opens the
logger, and turns the recipe's reports into events.
"""

import logging
import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.util

from events.actors import AnyLog, connect
from events.decide import Refused
from events.facts import CheckpointSaved, CheckpointsDeleted, Event, MetricsRecorded, RunStarted, StepMetrics
from events.ids import new_event_id
from events.job import FineTuningJob
from trainers.errors import InfrastructureError
from trainers.planning.plan import COMPILED, Plan
from trainers.priority import give_way
from trainers.retrying import retrying
from trainers.running.job_output import LineWriter, log_to_stdout
from trainers.running.output import OutputCapture
from trainers.running.tenure import Cancelled, Superseded, Tenure, Watch
from trainers.training.loggers import End, Logger, open_logger
from trainers.training.reporting import SavedCheckpoint, Stopped

logger = logging.getLogger("tunewright.train")

FINISHED = "finished"
PAUSED = "paused"
"""Return values of `train_worker`: the run has done all its steps, or stopped at a checkpoint because the job is to
pause. A run that is aborted returns nothing."""

METRICS_FLUSH_S = 0.5
"""Seconds for which metrics are gathered into one event."""
LEAVE_S = 4.0
"""Seconds that a worker gets to close its logger and send its last lines before it is killed. W&B may have to
upload."""


@dataclass(frozen=True)
class Assignment:
    """A worker's task. Plain data, without secrets: the dashboard's Train API shows it."""

    job_id: str
    attempt: int
    interruptions: int
    """Identifies the runner's tenure, see trainers.running.tenure."""
    plan: dict[str, Any]
    storage: str
    job_dir: str
    model_dir: str
    resume_from: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_reporter: "RayReporter | None" = None  # this process's


def leave(end: End) -> None:
    """Called by the runner in a worker that is about to be killed, at any point of its work: see
    `RayReporter.leave`."""
    if _reporter is not None:
        _reporter.leave(end)


def train_worker(config: dict[str, Any]) -> str:
    """Runs one rank of one attempt. Prints the recipe's errors to the job's log, and raises them."""
    global _reporter
    give_way()
    assignment = Assignment(**config)
    handles = connect(Path(assignment.storage))
    context = ray.train.get_context()
    rank = context.get_world_rank()
    capture = OutputCapture(LineWriter(handles.lines, assignment.job_id, rank), tee=True)
    tenure = Tenure(handles.log, assignment.job_id, assignment.interruptions)
    reporter = RayReporter(assignment, rank, handles.log, tenure, capture.flush)
    _reporter = reporter
    watch = Watch(
        handles.log,
        assignment.job_id,
        assignment.attempt,
        tenure,
        reporter.look,
        lambda reason: reporter.leave(_end_of(reason)),
    )
    end: End = "failed"
    try:
        log_to_stdout()
        job_dir = Path(assignment.job_dir)
        train_data = job_dir / "data" / "train"
        check_storage(train_data)
        # Imports torchtune, whose warnings belong in the job's log.
        from trainers.training.recipe import train

        plan = Plan.model_validate(assignment.plan)
        # One cache for each job: a compilation that is killed leaves broken files, which would fail every later job.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job_dir / COMPILED)
        train(
            plan,
            model_dir=Path(assignment.model_dir),
            train_data=train_data,
            valid_data=job_dir / "data" / "valid" if plan.validation_data else None,
            output_dir=job_dir,
            reporter=reporter,
            resume_from=Path(assignment.resume_from) if assignment.resume_from else None,
            attempt=assignment.attempt,
        )
        end = "finished"
    except Superseded as reason:
        end = _end_of(reason)
        logger.warning("attempt %d ends here: %s", assignment.attempt, reason)
        raise
    except Stopped as stopped:
        end = "paused"
        logger.info("%s for a pause", stopped)
        return PAUSED
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        try:
            reporter.close(end)
        finally:
            watch.close()
            capture.close()  # sends the last lines, which say what went wrong
    return FINISHED


def _end_of(reason: Exception) -> End:
    """The end of a run that was superseded for this `reason`."""
    return "cancelled" if isinstance(reason, Cancelled) else "replaced"


def check_storage(written: Path) -> None:
    """Raises InfrastructureError if this node doesn't see a path that the runner has written on the head node."""
    if not written.exists():
        node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        raise InfrastructureError(
            "storage_not_shared",
            f"the node {node} ({socket.gethostname()}) doesn't see {written}, as the head does; the storage directory "
            "is not mounted there, or another one is",
            suggestion="mount what TUNEWRIGHT_STORAGE is on the head there, at the same path, or take the node out of "
            "the cluster; then submit the job again",
        )


class RayReporter:
    """Turns the recipe's reports into events. Rank 0 reports for all; on other ranks every report is a no-op.

    A thread appends the metrics, so a step never waits for the log. When `checkpoint` returns, the checkpoint is
    recorded, after all metrics and lines that came before it.
    """

    def __init__(
        self,
        assignment: Assignment,
        rank: int,
        log: AnyLog,
        tenure: Tenure,
        flush_output: Callable[[], None],
    ) -> None:
        self._assignment = assignment
        self._flush_output = flush_output
        self._tenure = tenure
        self._speaks = rank == 0
        self._log = log
        self._logger: Logger | None = None
        self._logging = threading.Lock()
        self._queue: queue.SimpleQueue[StepMetrics | threading.Event | None] = queue.SimpleQueue()
        self._pausing = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, name="metrics", daemon=True)
        if self._speaks:
            self._thread.start()

    def started(self, total_steps: int, device: str) -> None:
        if not self._speaks:
            return
        from trainers.training.checkpoint import load_standing  # imports torch, as the recipe has by now

        context = ray.train.get_context()
        plan = Plan.model_validate(self._assignment.plan)
        job_dir, checkpoint = Path(self._assignment.job_dir), self._assignment.resume_from
        self._logger = open_logger(
            plan, self._assignment.job_id, job_dir, load_standing(Path(checkpoint)).progress.step if checkpoint else 0
        )
        self._tenure.append(
            RunStarted(
                attempt=self._assignment.attempt,
                workers=context.get_world_size(),
                nodes=-(-context.get_world_size() // context.get_local_world_size()),
                device=device,
                total_steps=total_steps,
                n_epochs=plan.n_epochs,
                logs=self._logger.uri,
            )
        )

    def metrics(self, metrics: StepMetrics) -> None:
        if not self._speaks:
            return
        if self._failure is not None:
            raise self._failure
        with self._logging:
            if self._logger is not None:
                self._logger.log(metrics)
        self._queue.put(metrics)

    def checkpoint(self, checkpoint: SavedCheckpoint) -> None:
        if not self._speaks:
            return
        self._flush()
        self._flush_output()  # an attempt that resumes from it repeats only later lines
        self._append(
            CheckpointSaved(
                attempt=self._assignment.attempt,
                step=checkpoint.step,
                epoch=checkpoint.epoch,
                uri=checkpoint.path.as_uri(),
                metrics=checkpoint.metrics,
                best=checkpoint.best,
            )
        )

    def deleted(self, checkpoints: list[Path]) -> None:
        if self._speaks:
            uris = [path.as_uri() for path in checkpoints]
            self._append(CheckpointsDeleted(attempt=self._assignment.attempt, uris=uris))

    def should_stop(self) -> bool:
        """True once the job is to pause. (If it is cancelled, its workers are killed instead.)"""
        return self._pausing.is_set()

    def look(self, job: FineTuningJob) -> None:
        """Takes note of a pause. `job` is as the log has it now."""
        if job.pausing and job.attempt == self._assignment.attempt:
            self._pausing.set()

    def close(self, end: End) -> None:
        """Returns once everything reported is in the log and the logger is closed."""
        if not self._speaks or not self._thread.is_alive():
            return
        self._queue.put(None)
        self._thread.join()
        self._close_logger(end)

    def leave(self, end: End) -> None:
        """As `close`, but during the run, and for at most `LEAVE_S`; sends printed lines, too. The caller then kills
        the process. Later reports are lost."""
        leaving = threading.Thread(target=self._leave, args=(end,), name="leave", daemon=True)
        leaving.start()
        leaving.join(LEAVE_S)

    def _leave(self, end: End) -> None:
        self._close_logger(end)  # first: it needs neither of the log's actors
        self._flush_output()
        self.close(end)

    def _close_logger(self, end: End) -> None:
        with self._logging:
            logger, self._logger = self._logger, None
            if logger is not None:
                logger.close(end)

    def _flush(self) -> None:
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        if self._failure is not None:
            raise self._failure

    def _drain(self) -> None:
        """Runs in a thread: gathers metrics for `METRICS_FLUSH_S`, and appends them as one event."""
        while True:
            batch: list[StepMetrics] = []
            waiter: threading.Event | None = None
            deadline: float | None = None
            last = False
            while True:
                try:
                    item = self._queue.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if isinstance(item, StepMetrics):
                    batch.append(item)
                    deadline = deadline or time.monotonic() + METRICS_FLUSH_S
                    continue
                waiter, last = item, item is None
                break
            if batch and self._failure is None:
                self._append_in_thread(batch)
            if waiter is not None:
                waiter.set()
            if last:
                return

    def _append_in_thread(self, batch: list[StepMetrics]) -> None:
        try:
            self._append(MetricsRecorded(attempt=self._assignment.attempt, steps=batch))
        except BaseException as error:  # noqa: BLE001  -- handed to the training thread, which raises it
            self._failure = error

    def _append(self, event: Event) -> None:
        """Appends the event. Raises Superseded if the log refuses it: the job is over, or goes on without this
        attempt."""
        job_id, event_id = self._assignment.job_id, new_event_id()
        try:
            self.look(retrying(lambda: self._log.append(job_id, [event], [event_id])))
        except Refused as refusal:
            self._tenure.check(retrying(lambda: self._log.job(job_id)))
            raise Superseded(str(refusal)) from refusal

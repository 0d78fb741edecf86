"""One job's driver process: prepares the data, waits to be admitted, trains, records the outcome.

The dispatcher starts it as the job's Ray Job (`python -m trainers run <job_id>`). It may be killed and started again at
any moment: it reads in the event log how far the job is, and goes on from there.
"""

import importlib
import logging
import signal
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import ray
from pydantic import ValidationError

from events.actors import NAMESPACE, AnyLog, connect
from events.decide import Refused
from events.facts import (
    DataRejected,
    DataReport,
    DataValidated,
    Event,
    JobError,
    JobFailed,
    JobSucceeded,
    Resources,
    RunInterrupted,
)
from events.job import FineTuningJob
from events.log import LogUnavailable
from trainers.data.cache import DataCache
from trainers.data.chat import ChatTokenizer
from trainers.data.dataset import TokenisedDataset
from trainers.data.prepare import NO_END, DataInvalid, bad_lines, hardly_meant, prepare, prepared
from trainers.data.source import check_data_uri
from trainers.dispatching import leftovers
from trainers.dispatching.admission import Capacity, describe, memory_share, worker_memory
from trainers.dispatching.cluster import Cluster
from trainers.errors import (
    AGAIN,
    REPORT,
    ConfigProblems,
    InfrastructureError,
    JobProblem,
    UserError,
    storage_away,
    storage_problem,
    write_details,
)
from trainers.models.architecture import inspect_model_dir
from trainers.models.pinned import PinnedModel, pinned_model
from trainers.planning.fitting import check_memory, recomputing_if_needed, surely_fits
from trainers.planning.plan import Plan, plan_of
from trainers.planning.preflight import problems_of
from trainers.planning.suitability import check_suitable, longest_row
from trainers.resubmit import model_dir_of
from trainers.retrying import retrying
from trainers.running.job_output import JobOutput, leave_the_raylet_out
from trainers.running.tenure import Superseded, Tenure
from trainers.settings import Settings
from trainers.training.reporting import Paused

logger = logging.getLogger("tunewright.runner")

WAIT_S = 30.0
"""Length of one call that waits for the job's next event."""
MODEL_AWAY_S = 120.0
"""Seconds for which a model's disk or hub may be unreachable before that counts as an interruption."""
MODEL_PAUSE_S = 5.0
"""Pause between two attempts to reach it."""
PINNED = "model.json"
"""The file, beside a job's tokenised rows, that names the model they were tokenised for."""


def run(job_id: str, settings: Settings) -> int:
    """Runs the job to its end or its next pause. Returns the process's exit code: 1 if the job is over and has not
    succeeded, else 0.

    SIGINT raises KeyboardInterrupt, at any point.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell started Ray in the background
    threading.Thread(target=importlib.import_module, args=("trainers.running.fit",), daemon=True).start()
    leave_the_raylet_out()
    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    handles = connect(settings.storage)
    log = handles.log
    job = retrying(lambda: log.job(job_id))
    if job.finished_at is not None:
        return 0 if job.status == "success" else 1
    tenure = Tenure(log, job_id, job.interruptions)
    with JobOutput(handles.lines, job_id):
        outcome = _outcome(job, log, tenure, settings)
    if outcome is None:
        return 0
    # By now all lines are in the job's log: a tail may stop at the event that ends the job.
    _record(outcome, job_id, tenure, settings.job_dir(job_id))
    return 0 if isinstance(outcome, JobSucceeded) else 1


def _outcome(job: FineTuningJob, log: AnyLog, tenure: Tenure, settings: Settings) -> Event | None:
    """Does the job's work, in as many attempts as it may have, and returns the event that ends the job. None: the job
    has stopped at a checkpoint to pause, or is being cancelled (the dispatcher records both once this process is gone),
    or belongs to another runner by now.

    The one place where exceptions become an outcome. It raises only LogUnavailable, after which no outcome could be
    recorded, and errors of the storage's disk once the job's data is ready. The dispatcher counts both as a lost
    runner.
    """
    job_dir = settings.job_dir(job.job_id)
    try:
        plan = _its_plan(job)
        job, model = _its_model(job, plan, log, tenure, settings)
        plan = plan.model_copy(update={"model": model.name})
        capacity = Cluster().capacity
        job = _make_data_ready(job, plan, model.directory, tenure, settings, capacity)
        while True:
            job = _wait_until_admitted(job, log, tenure)
            job, model = _its_model(job, plan, log, tenure, settings)  # it may have waited for hours, or trained
            try:
                interruption = _attempt(job, plan, model.directory, settings, capacity())
            except Paused:
                return None
            if interruption is None:
                return _success(job, log, tenure)
            job = _record_interruption(job, interruption, log, tenure)
    except Superseded as reason:
        logger.warning("this runner ends here: %s", reason)
        return None
    except LogUnavailable:
        raise  # not the job's fault: the dispatcher starts another runner once the log is back
    except DataInvalid as problem:
        return _failure(job, job_dir, problem.error, str(problem), problem.report)
    except JobProblem as problem:
        return _failure(job, job_dir, problem.error, traceback.format_exc())
    except Exception as error:
        if job.data is not None and storage_away(error):
            raise  # an interruption: the dispatcher counts it, and starts another runner
        cause = storage_problem(error) or InfrastructureError(
            "internal_error", f"{type(error).__name__}: {error}", suggestion=REPORT, retryable=False
        )
        return _failure(job, job_dir, cause.error, traceback.format_exc())


def _its_plan(job: FineTuningJob) -> Plan:
    """As `plan_of`, but an invalid config raises UserError `config_outdated`: another version has accepted it."""
    try:
        return plan_of(job)
    except (ConfigProblems, ValueError) as error:
        fields = problems_of(error.errors(include_input=False)) if isinstance(error, ValidationError) else None
        refused = ConfigProblems(fields) if fields else error
        raise UserError(
            "config_outdated",
            f"the job was submitted to another version of Tunewright, and this one refuses its config: {refused}.",
            suggestion="submit it again without that",
        ) from error


def _its_model(
    job: FineTuningJob, plan: Plan, log: AnyLog, tenure: Tenure, settings: Settings
) -> tuple[FineTuningJob, PinnedModel]:
    """The job, and the model that it is pinned to.

    If the model's disk or hub doesn't answer: a job whose data is not ready yet fails, with `pinned_model`'s error.
    Else it is tried again; after `MODEL_AWAY_S` that is recorded as an interruption, and the job waits in line to be
    admitted again. Raises as `pinned_model`, or Superseded.
    """
    since: float | None = None
    while True:
        try:
            return job, pinned_model(plan.model, settings.job_dir(job.job_id) / "data" / PINNED, settings, logger.info)
        except InfrastructureError as problem:
            if job.data is None:  # no work would be lost
                raise
            reason = problem.error.message.removesuffix(".")
        if since is None:
            since = time.monotonic()
            logger.warning("the model can't be reached: %s; trying again for up to %g s", reason, MODEL_AWAY_S)
        if time.monotonic() - since < MODEL_AWAY_S:
            job = retrying(partial(log.wait, job.job_id, job.version, MODEL_PAUSE_S))
            tenure.check(job)
        else:
            since = None
            job = _wait_until_admitted(_record_interruption(job, reason, log, tenure), log, tenure)


def _make_data_ready(
    job: FineTuningJob,
    plan: Plan,
    model_dir: Path,
    tenure: Tenure,
    settings: Settings,
    capacity: Callable[[], Capacity],
) -> FineTuningJob:
    """Reads, checks and tokenises every row of both files into the job's directory, unless an earlier runner has;
    checks that the job fits the memory of a node; and records DataValidated. Raises JobProblem."""
    architecture = inspect_model_dir(model_dir)
    check_suitable(plan, architecture)
    tokenizer = ChatTokenizer.from_dir(model_dir)
    max_seq_len = longest_row(plan, architecture)
    if not tokenizer.ends_turns:
        logger.warning(NO_END)

    def ready(uri: str, name: str) -> DataReport:
        out_dir = settings.job_dir(job.job_id) / "data" / name
        # A resumed job keeps the data that it started with, even if the file has changed since.
        report = prepared(out_dir, max_seq_len)
        logger.info(
            "validating %s" if report is None else "already validated; going on with the data as it was then: %s", uri
        )
        try:
            report = report or prepare(
                check_data_uri(uri, settings),
                tokenizer,
                max_seq_len=max_seq_len,
                pairs=plan.pairs,
                out_dir=out_dir,
                cache=DataCache(settings.data_cache, settings.data_cache_bytes),
                max_invalid_fraction=plan.max_invalid_fraction,
                progress=logger.info,
            )
        except JobProblem as problem:
            raise problem.placed(param="data" if name == "train" else "validation_data") from None
        logger.info(
            "%s: %s %s, %s tokens, %s of them trained, %s rows truncated to %s tokens, %s invalid rows skipped",
            uri,
            f"{report.rows:,}",
            "pairs" if plan.pairs else "rows",
            f"{report.tokens:,}",
            f"{report.trained_tokens:,}",
            f"{report.truncated_rows:,}",
            f"{report.max_seq_len:,}",
            f"{report.invalid_rows:,}",
        )
        for warning in hardly_meant(report, tokenizer, plan.max_seq_len, architecture.max_seq_len):
            logger.warning("%s: %s", uri, warning)
        return report

    data = ready(plan.data, "train")
    validation_data = ready(plan.validation_data, "valid") if plan.validation_data else None
    if job.data is not None:
        return job
    if (worker_bytes := worker_memory(needed(job), capacity())) is not None:
        rows = _training_rows(job, settings)
        if not surely_fits(plan, architecture, rows.lengths, worker_bytes):
            # Imports torch, which takes seconds: not for a job that surely fits.
            from trainers.training.load import load_of

            check_memory(plan, architecture, load_of(plan, architecture, rows), worker_bytes)
    return tenure.append(DataValidated(data=data, validation_data=validation_data))


def _wait_until_admitted(job: FineTuningJob, log: AnyLog, tenure: Tenure) -> FineTuningJob:
    """Returns once the dispatcher has admitted the job. Raises Superseded."""
    if not job.admitted:
        logger.info("waiting for resources: %s", describe(needed(job)))
    while not job.admitted:
        job = retrying(partial(log.wait, job.job_id, job.version, WAIT_S))
        tenure.check(job)
    return job


def _training_rows(job: FineTuningJob, settings: Settings) -> TokenisedDataset:
    return TokenisedDataset(settings.job_dir(job.job_id) / "data" / "train")


def _attempt(job: FineTuningJob, plan: Plan, model_dir: Path, settings: Settings, capacity: Capacity) -> str | None:
    """Trains, from the last checkpoint if there is one. Returns why the attempt was interrupted; None: it finished."""
    # Not at the top: torch and Ray Train take seconds. A thread has been importing them since the start.
    from trainers.running.fit import Interrupted, fit
    from trainers.running.worker import Assignment

    checkpoint = latest_checkpoint(job)
    share, lengths = memory_share(needed(job), capacity), _training_rows(job, settings).lengths
    run = recomputing_if_needed(plan, inspect_model_dir(model_dir), lengths, share)
    if run != plan:
        logger.info("enable_activation_checkpointing has no effect: all activations fit the memory of a worker")
    assignment = Assignment(
        job_id=job.job_id,
        attempt=job.attempt + 1,
        interruptions=job.interruptions,
        plan=run.model_dump(mode="json"),
        storage=str(settings.storage),
        job_dir=str(settings.job_dir(job.job_id)),
        model_dir=str(model_dir),
        resume_from=str(checkpoint) if checkpoint else None,
    )
    origin = f"going on from {checkpoint.name}" if checkpoint else "starting"
    logger.info("attempt %d: %s, on %s", assignment.attempt, origin, describe(needed(job)))
    try:
        fit(assignment, needed(job))
    except Interrupted as interruption:
        logger.warning("attempt %d was interrupted: %s", assignment.attempt, interruption)
        return str(interruption)
    return None


def needed(job: FineTuningJob) -> Resources:
    """The resources that the job was submitted with. Raises InfrastructureError `damaged_log` if the log lacks them."""
    if job.resources is None:
        raise InfrastructureError(
            "damaged_log",
            f"the log of {job.job_id} does not begin with its submission",
            suggestion="ask the operator to restore a backup of the event log, or submit the job again",
            retryable=False,
        )
    return job.resources


def latest_checkpoint(job: FineTuningJob) -> Path | None:
    """The job's newest recorded checkpoint whose training state exists: the one to resume from."""
    for uri in reversed(job.checkpoints):
        path = Path(unquote(urlsplit(uri).path))
        if (path / "training_state").is_dir():
            return path
    return None


def _record_interruption(job: FineTuningJob, reason: str, log: AnyLog, tenure: Tenure) -> FineTuningJob:
    """Records an interruption, which sends the job back to the queue. Raises InfrastructureError if it was one too
    many, or Superseded."""
    job = tenure.append(RunInterrupted(attempt=retrying(lambda: log.job(job.job_id)).attempt, reason=reason))
    if job.interruptions > job.max_restarts:  # if this process dies here, the dispatcher fails the job
        raise InfrastructureError(
            "interrupted_too_often",
            f"{reason}; that was interruption {job.interruptions}, and --max-restarts is {job.max_restarts}",
            suggestion=AGAIN,
        )
    return job


def _success(job: FineTuningJob, log: AnyLog, tenure: Tenure) -> JobSucceeded:
    job = retrying(lambda: log.job(job.job_id))
    tenure.check(job)
    model = f"; the model is in {model_dir_of(job.checkpoints[-1])}" if job.checkpoints else ""
    if job.best_checkpoint is not None and job.best_checkpoint != job.checkpoints[-1]:
        model += f"; the one with the lowest validation loss is in {model_dir_of(job.best_checkpoint)}"
    logger.info("training is complete%s", model)  # not that the job has succeeded: it may yet be cancelled
    return JobSucceeded(attempt=job.attempt)


def _failure(
    job: FineTuningJob, job_dir: Path, error: JobError, details: str, report: DataReport | None = None
) -> DataRejected | JobFailed:
    logger.error("job failed (%s, %s): %s", error.code, f"fault of the {error.fault}", error.message)
    lines = bad_lines(report) if report else []
    for line in lines:
        logger.error("%s", line)
    path = write_details("\n".join([details, *lines]), job_dir)
    if path is not None and job.data is None and error.fault == "user":
        of_validation = error.param == "validation_data"
        return DataRejected(
            error=error,
            error_path=path,
            data=None if of_validation else report,
            validation_data=report if of_validation else None,
        )
    return JobFailed(error=error, error_path=path)


def _record(outcome: Event, job_id: str, tenure: Tenure, job_dir: Path) -> None:
    try:
        job = tenure.append(outcome)
    except (Refused, Superseded) as refusal:
        # It was cancelled meanwhile (the dispatcher records that once this process is gone), or has another runner.
        logger.warning("%s: %s", job_id, refusal)
    else:
        leftovers.clear(job, job_dir)

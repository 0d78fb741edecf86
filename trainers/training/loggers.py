"""The logger of a job: it writes metrics as JSON lines to disk, or sends them to Weights & Biases. (Metrics go to the
event log in any case.)

`resumed_step` is the step of the checkpoint that a run resumes from; 0 at the start. The steps after it that an earlier
attempt logged are logged again. The disk logger drops their old lines. W&B keeps the first value it gets for a step,
which is the same.
"""

import json
import logging
import netrc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO
from urllib.parse import urlsplit

from events.disk import sync_path
from events.facts import StepMetrics
from trainers.planning.plan import DiskLog, Plan, WandBLog

if TYPE_CHECKING:
    import wandb

_log = logging.getLogger("tunewright.train")

INIT_S = 60.0
"""Time for W&B's server to accept a run."""
FINISH_S = 60.0
"""Time for W&B to upload the rest at the end of a run. Its own default is to wait for ever, while the job holds its
GPUs."""


End = Literal["finished", "failed", "cancelled", "paused", "replaced"]
"""How a run of a job ends. `replaced`: another run of the job continues in its place, and may have begun."""
_EXIT_CODES: dict[End, int] = {"finished": 0, "failed": 1, "cancelled": 255, "paused": 1}
"""W&B takes a run's state from its exit code. 255 is its own code for Ctrl-C. A paused run has the code of a failed
one, and is marked as preempting besides."""


class Logger(Protocol):
    """Takes the metrics of a run."""

    @property
    def uri(self) -> str:
        """The URI of the metrics."""

    def log(self, metrics: StepMetrics) -> None:
        """Logs the metrics of a step or an evaluation. They are visible soon, at the latest after `close`."""

    def close(self, end: End) -> None:
        """Must be called once, at the end of the run."""


def open_logger(plan: Plan, job_id: str, job_dir: Path, resumed_step: int) -> Logger:
    """Opens the logger of `plan`. Only one process of a job may log with it. Opening starts the W&B run, whose URI
    isn't known before; it doesn't change the disk logger's file yet."""
    if isinstance(plan.logger, DiskLog):
        return DiskLogger(job_dir / plan.logger.filename, resumed_step)
    return WandBLogger(plan.logger, job_id, job_dir, plan.model_dump(mode="json"), resumed_step)


class DiskLogger:
    """Writes one JSON object per line: the fields of StepMetrics that have a value. Values that
    aren't finite are strings, such as `"NaN"`.

    A run replaces the file when it writes its first line; a process that had the old file open goes on in a file that
    has no name any more. If the disk is full, lines are missing from the file; the job goes on, and its log says so
    once. A line that was cut short is completed when there is room again; as the last line it may stay cut short.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        self._resumed_step = resumed_step
        self._file: TextIO | None = None
        self._told = False

    @property
    def uri(self) -> str:
        return self._path.resolve().as_uri()

    def log(self, metrics: StepMetrics) -> None:
        try:
            if self._file is None:
                self._file = _with_lines_up_to(self._resumed_step, self._path)
            self._file.write(metrics.model_dump_json(exclude_none=True) + "\n")
            self._file.flush()  # on failure keeps the rest of the line; the next call goes on from there
        except OSError as error:
            self._tell(error)

    def close(self, end: End = "finished") -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            _log.warning("metrics could not be written to %s (the service's own log has them): %s", self._path, error)
        self._told = True


def _with_lines_up_to(step: int, path: Path) -> TextIO:
    """Replaces the file at `path` by a new one with its lines up to `step` (none for 0), without a line that a crash
    cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(".metrics.draft")  # a name made from the file's might be too long
    new = draft.open("w", encoding="utf-8")
    new.writelines(_lines_up_to(step, path))
    new.flush()
    sync_path(draft)  # so that a power cut leaves the old file or the new one, never an empty one
    draft.replace(path)
    return new


def _lines_up_to(step: int, path: Path) -> Iterator[str]:
    if step > 0 and path.exists():
        with path.open(encoding="utf-8", errors="replace") as old:
            yield from (line for line in old if line.endswith("\n") and _step_of(line) <= step)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class WandBLogger:
    """A W&B run whose id is the job's. All attempts of a job log to the same run.

    The run is offline if WANDB_MODE says so, without an API key, or if the server can't be reached. The job's log then
    says how to upload it. Later errors of W&B are logged there, too; they neither end nor delay the job.

    W&B buffers the file of an offline run: if the process is killed, its last steps are lost, and all steps of a short
    run. So the metrics of an offline run are also kept as JSON lines. An attempt that resumes logs these lines again
    first, so the last attempt's directory has all of them.
    """

    def __init__(self, spec: WandBLog, job_id: str, job_dir: Path, config: dict[str, Any], resumed_step: int) -> None:
        import wandb

        def start(mode: str) -> "wandb.Run":
            return wandb.init(
                project=spec.project,
                entity=spec.entity,
                id=job_id,
                name=spec.name or job_id,
                tags=spec.tags,
                resume="allow",
                dir=job_dir,
                config=config,
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(
                    console="off",  # the job's log has the output already
                    init_timeout=INIT_S,
                    finish_timeout=FINISH_S,
                    finish_timeout_raises=True,
                ),
            )

        self._errors = (wandb.Error, OSError)
        self._broken = False
        job_dir.mkdir(parents=True, exist_ok=True)
        reason = _why_offline()
        if reason is None:
            try:
                self._run = start("online")
            except wandb.Error as error:
                reason = f"the server did not accept the run ({error})"
                wandb.teardown()  # W&B's process may still be waiting for the server, with a run of this id
        if reason is not None:
            self._run = start("offline")
            _log.warning(
                "the W&B run is offline: %s. To upload it later: wandb sync %s", reason, Path(self._run.dir).parent
            )
        kept = job_dir / "wandb" / "metrics.jsonl"
        for line in _lines_up_to(resumed_step, kept):
            metrics = StepMetrics.model_validate_json(line)
            if metrics.step >= self._run.starting_step:  # the server of an online run has those before
                self._send(metrics)
        self._kept = DiskLogger(kept, resumed_step) if self._run.offline else None

    @property
    def uri(self) -> str:
        return Path(self._run.dir).parent.resolve().as_uri() if self._run.offline else str(self._run.url)

    def log(self, metrics: StepMetrics) -> None:
        if self._kept is not None:
            self._kept.log(metrics)
        self._send(metrics)

    def close(self, end: End) -> None:
        if self._kept is not None:
            self._kept.close()
        if end == "paused":
            self._try(self._run.mark_preempting)
        if end != "replaced":  # the W&B run belongs to the job's other run by now
            self._try(lambda: self._run.finish(exit_code=_EXIT_CODES[end]))

    def _send(self, metrics: StepMetrics) -> None:
        if not self._broken:
            self._try(
                lambda: self._run.log(metrics.model_dump(exclude_none=True, exclude={"step", "time"}), metrics.step)
            )

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except self._errors as error:
            self._broken = True
            reason, directory = f"{type(error).__name__}: {error}", Path(self._run.dir).parent
            _log.warning(
                "the last metrics did not reach W&B (%s). To upload what was saved: wandb sync %s", reason, directory
            )


def _why_offline() -> str | None:
    """Why the run is offline; None if the server is to be tried."""
    mode = os.environ.get("WANDB_MODE")
    # "disabled" would make no run at all, so that the job's logs had no URI.
    if mode in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE is {mode} in the workers' environment"
    return None if _has_api_key() else "there is no WANDB_API_KEY in the workers' environment"


def _has_api_key() -> bool:
    """Whether there is an API key in the environment, or in the netrc file, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return bool(host and netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False

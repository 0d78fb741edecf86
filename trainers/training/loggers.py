"""The logger a job asks for: metrics as JSON lines on disk, or to Weights & Biases.

Metrics go to the event log in any case. `resumed_step` is the step of the checkpoint that a run goes on from, 0 where
it starts from the beginning: what an earlier attempt logged beyond it will be logged again. The disk logger drops it;
W&B keeps the first value it got for a step, which is the same one.
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
"""For W&B's server to accept a run."""
FINISH_S = 60.0
"""For W&B to upload what is left at the end. Its own default is to wait for ever, with the job's GPUs."""


End = Literal["finished", "failed", "cancelled", "paused", "replaced"]
"""How a run of a job ends. `replaced`: another run of the job goes on in its place, and may have begun."""
_EXIT_CODES: dict[End, int] = {"finished": 0, "failed": 1, "cancelled": 255, "paused": 1}
"""What W&B makes a run's state of. 255 is its own for Ctrl-C; of one that fails it has to be told that it is paused."""


class Logger(Protocol):
    @property
    def uri(self) -> str:
        """Where the metrics can be seen."""

    def log(self, metrics: StepMetrics) -> None:
        """Takes one step's metrics; they are visible soon, and in any case after `close`."""

    def close(self, end: End) -> None:
        """To be called once, with how the run ended."""


def open_logger(plan: Plan, job_id: str, job_dir: Path, resumed_step: int) -> Logger:
    """The logger of `plan`. Only one process of a job may log with it. Opening it begins W&B's run, whose URI is not
    known before, and changes nothing yet of a file."""
    if isinstance(plan.logger, DiskLog):
        return DiskLogger(job_dir / plan.logger.filename, resumed_step)
    return WandBLogger(plan.logger, job_id, job_dir, plan.model_dump(mode="json"), resumed_step)


class DiskLogger:
    """One JSON object a line: the fields of StepMetrics that have a value. What is no number is a string, `"NaN"`.

    A run takes the file over with its first line. Whoever had it open before goes on in a file that nobody sees. What
    a full disk doesn't take is lost to the file, and the job goes on: its log says so, once. A line that was cut short
    is ended when there is room; at the end of the file it may stay so.
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
            self._file.flush()  # keeps what was not taken, and goes on from there: a line that was cut short is ended
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
    """A new file at `path`, with the old one's lines up to `step` (none for 0) and no line that a crash cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(".metrics.draft")  # the name of the file may be as long as a name can be
    new = draft.open("w", encoding="utf-8")
    new.writelines(_lines_up_to(step, path))
    new.flush()
    sync_path(draft)  # a power cut is to leave the old one or this, and no empty file
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
    """A W&B run whose id is the job's: an attempt that resumes goes on in the same run, and how one ends is its state.

    Offline where WANDB_MODE says so, without an API key, and where the server can't be reached: the job's log says how
    to upload the run. What goes wrong later is told there too, and neither ends nor delays the job.

    W&B buffers an offline run's file: one that is killed loses its last steps, a short one all. So its metrics are also
    kept as lines of JSON, with which an attempt that resumes begins its own: the last attempt's directory has them all.
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
                wandb.teardown()  # W&B's own process may still wait for the server, with a run of this id
        if reason is not None:
            self._run = start("offline")
            _log.warning(
                "the W&B run is offline: %s. To upload it later: wandb sync %s", reason, Path(self._run.dir).parent
            )
        kept = job_dir / "wandb" / "metrics.jsonl"
        for line in _lines_up_to(resumed_step, kept):
            metrics = StepMetrics.model_validate_json(line)
            if metrics.step >= self._run.starting_step:  # of an online run: the server has those before
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
        if end != "replaced":  # the run is the other one's by now
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
    """None: the server is to be tried."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun", "disabled"):  # of which the last would leave no run to name as the job's logs
        return f"WANDB_MODE is {mode} in the workers' environment"
    return None if _has_api_key() else "there is no WANDB_API_KEY in the workers' environment"


def _has_api_key() -> bool:
    """In the environment, or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return bool(host and netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False

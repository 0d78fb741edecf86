"""Deletes the files of a job that are of no use once it is over."""

import shutil
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from events.job import FineTuningJob
from trainers.planning.plan import COMPILED, REFERENCE


def clear(job: FineTuningJob, job_dir: Path) -> None:
    """Deletes what only the job's next attempt would need (its rows as tokens, the optimizer's state, DPO's reference
    log-probabilities), compiled code, and rows and checkpoints whose writing or deletion was cut short by a kill.

    `job` is as the log has it now. Recorded checkpoints stay, without their optimizer state. One that was written and
    not recorded is deleted once the job is over; before that, a worker that is cut off might still record it.
    """
    data, checkpoints = job_dir / "data", job_dir / "checkpoints"
    folders = [job_dir / COMPILED, data / "train", data / "valid", *data.glob(".train-*"), *data.glob(".valid-*")]
    for path in (*folders, *checkpoints.glob(".step-*")):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        (job_dir / REFERENCE).unlink()
    recorded = {Path(unquote(urlsplit(uri).path)).name for uri in job.checkpoints}
    # Only those with a state: one without was recorded once. The event log may be an older backup that doesn't know it.
    for state in list(checkpoints.glob("step-*/training_state")):
        checkpoint = state.parent
        if checkpoint.name in recorded:
            shutil.rmtree(state, ignore_errors=True)
        elif job.over:
            with suppress(OSError):
                # Hidden first: a checkpoint with its final name is complete.
                shutil.rmtree(checkpoint.rename(checkpoints / f".{checkpoint.name}.old"), ignore_errors=True)

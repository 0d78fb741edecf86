"""What the runs of a job leave in its directory, and nobody else could use."""

import shutil
from contextlib import suppress
from pathlib import Path

from trainers.planning.plan import COMPILED, REFERENCE


def clear(job_dir: Path) -> None:
    """Of a job that is over: what only its next attempt would need (its rows as tokens, the optimizer's state, what DPO
    compares with), compiled code, and rows and checkpoints that were being written, or deleted, when the process that
    did it was killed. The models of its checkpoints stay."""
    data, checkpoints = job_dir / "data", job_dir / "checkpoints"
    folders = [job_dir / COMPILED, data / "train", data / "valid", *data.glob(".train-*"), *data.glob(".valid-*")]
    for path in (*folders, *checkpoints.glob(".step-*"), *checkpoints.glob("*/training_state")):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        (job_dir / REFERENCE).unlink()

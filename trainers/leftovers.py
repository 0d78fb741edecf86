"""What the runs of a job leave in its directory, and nobody else could use."""

import shutil
from pathlib import Path

from trainers.plan import COMPILED


def clear(job_dir: Path) -> None:
    """Of a job that is over: its compiled code, and checkpoints that were being written, or deleted, when the process
    that did it was killed."""
    for path in (job_dir / COMPILED, *(job_dir / "checkpoints").glob(".step-*")):
        shutil.rmtree(path, ignore_errors=True)

"""What `make serve` says where the service can't start."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_storage_that_can_not_be_is_named_to_the_letter(tmp_path: Path) -> None:
    """Brackets of what is printed are not those of the terminal's markup."""
    storage = tmp_path / "jobs[" / "old]"
    storage.parent.mkdir()
    storage.touch()
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.local"],
        env={**os.environ, "TUNEWRIGHT_STORAGE": str(storage)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"The service failed: there can be no storage directory {storage}: File exists\n"

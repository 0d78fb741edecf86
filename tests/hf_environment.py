"""Runs scripts of tests/hf in a separate environment, which has transformers and peft, and no torchtune."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "hf"


def hf_python() -> Path:
    """The interpreter of that environment: TUNEWRIGHT_HF_PYTHON, else .venv-hf of this repository."""
    python = Path(os.environ.get("TUNEWRIGHT_HF_PYTHON") or REPOSITORY / ".venv-hf" / "bin" / "python")
    if not python.is_file():
        pytest.fail(f"there is no {python}: run `make test`, which makes the environment of tests/hf/requirements.txt")
    return python


def run_in_hf_environment(script: str, *arguments: str) -> str:
    """Runs tests/hf/`script`; returns its standard output. If the script fails, so does the test, with its output."""
    command = [str(hf_python()), str(SCRIPTS / script), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout

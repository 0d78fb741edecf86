"""Settings that can't be are named, each of them, and their values are not repeated: a URL may hold a password."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from trainers.settings import InvalidSettingsError, settings

WRONG = {
    "TUNEWRIGHT_CHAT_ENGINE": "nonsense",
    "TUNEWRIGHT_CHAT_MODELS": "0",
    "TUNEWRIGHT_USE_GPU": "perhaps",
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    settings.cache_clear()
    yield
    settings.cache_clear()


def test_each_wrong_setting_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WRONG.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettingsError) as error:
        settings()
    lines = str(error.value).splitlines()
    assert {line.partition(":")[0] for line in lines} == set(WRONG)
    assert "TUNEWRIGHT_CHAT_ENGINE: Input should be 'auto', 'torchtune' or 'vllm'" in lines
    assert not any(value in line for value in ("nonsense", "perhaps") for line in lines)


@pytest.mark.parametrize("command", [["serve_app.local"], ["trainers", "config.json"]])
def test_a_command_says_what_is_wrong_and_nothing_else(command: list[str]) -> None:
    env = {**os.environ, "TUNEWRIGHT_CHAT_ENGINE": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).splitlines()[-1].startswith("TUNEWRIGHT_CHAT_ENGINE: Input should be")
    assert "Traceback" not in done.stdout + done.stderr

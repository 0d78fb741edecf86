"""Settings. Errors name each invalid one but don't repeat its value: a URL may hold a password."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainers.settings import InvalidSettingsError, Settings, misspelled, settings

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


def test_a_misspelled_setting_gets_a_warning() -> None:
    set_by_others = ["TUNEWRIGHT_SERVICE_HOST", "TUNEWRIGHT_PORT_8000_TCP_ADDR", "TUNEWRIGHT_URL", "STORGE", "PATH"]
    good = ["TUNEWRIGHT_STORAGE", "TUNEWRIGHT_FILES", "tunewright_use_gpu"]
    assert misspelled(["TUNEWRIGHT_STORGE", "TUNEWRIGHT_DATA_ROOT", *set_by_others, *good]) == [
        "TUNEWRIGHT_DATA_ROOT is not a setting and has no effect: did you mean TUNEWRIGHT_DATA_ROOTS?",
        "TUNEWRIGHT_STORGE is not a setting and has no effect: did you mean TUNEWRIGHT_STORAGE?",
    ]


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """TUNEWRIGHT_STORAGE=$UNSET would put the log wherever the service happens to be started."""
    unset = Settings()
    for name in Settings.model_fields:
        monkeypatch.setenv(f"TUNEWRIGHT_{name.upper()}", "")
    assert Settings() == unset


def test_settings_that_a_process_is_given_override_the_environment_of_its_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = Settings()
    monkeypatch.setenv("TUNEWRIGHT_FILES", "s3://before/files")
    monkeypatch.setenv("TUNEWRIGHT_USE_GPU", "1")
    for name, value in given.as_env().items():
        monkeypatch.setenv(name, value)
    assert Settings() == given


@pytest.mark.parametrize(
    ("given", "expected"),
    [("uploads", "{here}/uploads"), ("~/uploads", "{home}/uploads"), ("s3://bucket/files", "s3://bucket/files")],
)
def test_a_directory_of_files_is_the_same_for_a_process_that_runs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    env = Settings(files=given).as_env()
    monkeypatch.chdir("/")
    monkeypatch.setenv("TUNEWRIGHT_FILES", env["TUNEWRIGHT_FILES"])
    assert Settings().files_url == expected.format(here=tmp_path, home=Path.home())


def test_hosts_are_names_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().hosts == ()
    settings.cache_clear()
    monkeypatch.setenv("TUNEWRIGHT_HOSTS", "Tuner.example:gpu-1")
    assert settings().hosts == ("tuner.example", "gpu-1")
    assert settings().as_env()["TUNEWRIGHT_HOSTS"] == "tuner.example:gpu-1"


@pytest.mark.parametrize(
    "hosts", ["tuner.example:8000", "a.example,b.example", "http://tuner.example", "größe.example"]
)
def test_hosts_must_be_names(monkeypatch: pytest.MonkeyPatch, hosts: str) -> None:
    monkeypatch.setenv("TUNEWRIGHT_HOSTS", hosts)
    with pytest.raises(InvalidSettingsError, match=r"TUNEWRIGHT_HOSTS: .* takes host names"):
        settings()


@pytest.mark.parametrize("command", [["serve_app.local"], ["trainers", "config.json"]])
def test_a_command_says_what_is_wrong_and_nothing_else(command: list[str]) -> None:
    env = {**os.environ, "TUNEWRIGHT_CHAT_ENGINE": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).splitlines()[-1].startswith("TUNEWRIGHT_CHAT_ENGINE: Input should be")
    assert "Traceback" not in done.stdout + done.stderr


def test_the_demo_reports_it_too() -> None:
    env = {**os.environ, "TUNEWRIGHT_CHAT_ENGINE": "nonsense", "COLUMNS": "40"}
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo"], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("The demo failed. TUNEWRIGHT_CHAT_ENGINE: Input should be")

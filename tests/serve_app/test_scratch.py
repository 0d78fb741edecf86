"""Directories of services that were killed are deleted by the next start, and no others."""

import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.scratch import LOCK_FILE, delete_abandoned, lock_directory


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tmp_path


def abandoned(parent: Path, name: str = "tw-killed") -> Path:
    directory = parent / name
    (directory / "session").mkdir(parents=True)
    (directory / LOCK_FILE).touch()
    return directory


def test_the_directory_of_a_service_that_was_killed_is_deleted(parent: Path) -> None:
    directory = abandoned(parent)
    delete_abandoned(parent)
    assert not directory.exists()


def test_that_of_a_live_service_stays_also_once_only_its_ray_head_is_left(parent: Path) -> None:
    directory = parent / "tw-alive"
    directory.mkdir()
    lock = lock_directory(directory)
    head = [sys.executable, "-c", "input()"]
    with subprocess.Popen(head, stdin=subprocess.PIPE, pass_fds=[lock.fileno()]) as process:
        delete_abandoned(parent)
        assert directory.is_dir()
        lock.close()
        delete_abandoned(parent)
        assert directory.is_dir()
        process.communicate(b"\n")
    delete_abandoned(parent)
    assert not directory.exists()


@pytest.mark.parametrize("told", ["in its environment", "on its command line"])
def test_that_of_a_killed_ray_head_stays_while_a_process_of_it_goes_on(parent: Path, told: str) -> None:
    directory = abandoned(parent)
    orphan = [sys.executable, "-c", "input()"]
    env = {"RAY_TMPDIR": str(directory)} if told == "in its environment" else {}
    if not env:
        orphan.append(f"--session-dir={directory}/session")
    with subprocess.Popen(orphan, stdin=subprocess.PIPE, env=env) as process:
        delete_abandoned(parent)
        assert directory.is_dir()
        process.communicate(b"\n")
    delete_abandoned(parent)
    assert not directory.exists()


def test_what_is_not_known_to_be_a_service_s_stays(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = abandoned(tmp_path_factory.mktemp("elsewhere"))
    (parent / "tw-link").symlink_to(elsewhere)
    (parent / "tw-notes").mkdir()
    (parent / "tw-file").touch()
    other_name = abandoned(parent, "notes")
    link_for_lock = parent / "tw-link-for-lock"
    link_for_lock.mkdir()
    (link_for_lock / LOCK_FILE).symlink_to(elsewhere / LOCK_FILE)
    before = sorted(parent.rglob("*"))
    delete_abandoned(parent)
    assert sorted(parent.rglob("*")) == before
    assert elsewhere.is_dir()
    assert other_name.is_dir()


def test_that_of_another_user_stays(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = abandoned(parent)
    owner = directory.stat().st_uid
    monkeypatch.setattr("serve_app.scratch.os.getuid", lambda: owner + 1)
    delete_abandoned(parent)
    assert directory.is_dir()

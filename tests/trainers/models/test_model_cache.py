"""The cache of models: what is made there once, and what is deleted of attempts that nobody finishes."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from huggingface_hub._local_folder import get_local_download_paths

from tests.power_cut import PowerCut
from tests.small_hub import SmallHub
from tests.tiny_models import make_tiny_model
from trainers.errors import InfrastructureError
from trainers.models import smollm2
from trainers.models.architecture import inspect_model_dir
from trainers.models.cache import ABANDONED_S, delete_abandoned, lock_file, make_once
from trainers.models.resolve import resolve_model
from trainers.settings import Settings


def test_jobs_that_want_the_same_model_at_once_make_it_once(tmp_path: Path) -> None:
    made, waiting, started, release = [], threading.Event(), threading.Event(), threading.Event()

    def make(partial: Path) -> None:
        made.append(partial)
        started.set()
        assert release.wait(10)

    def wait_for_it(message: str) -> None:
        assert "waiting" in message
        waiting.set()

    final = tmp_path / "cache" / "model"
    first = threading.Thread(target=make_once, args=(final, make, print))
    first.start()
    assert started.wait(10)
    assert not final.exists()
    second = threading.Thread(target=make_once, args=(final, make, wait_for_it))
    second.start()
    assert waiting.wait(10)
    release.set()
    first.join()
    second.join()
    assert len(made) == 1
    assert final.is_dir()


def test_a_power_cut_leaves_nothing_incomplete_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    power_cut = PowerCut(monkeypatch)

    def make(partial: Path) -> None:
        (partial / "additional_chat_templates").mkdir()
        for name in ("model.safetensors", "additional_chat_templates/tool_use.jinja"):
            (partial / name).write_bytes(b"content")

    rename = Path.rename

    def renaming(partial: Path, target: Path) -> Path:
        assert power_cut.leaves_content(partial)
        return rename(partial, target)

    monkeypatch.setattr(Path, "rename", renaming)
    assert power_cut.leaves(make_once(tmp_path / "model", make, print))


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "storage_full"), (errno.EIO, "storage_unreachable")])
def test_a_full_or_failing_disk_is_an_infrastructure_error(tmp_path: Path, number: int, code: str) -> None:
    def make(partial: Path) -> None:
        raise OSError(number, os.strerror(number), str(partial))

    with pytest.raises(InfrastructureError, match=os.strerror(number)) as caught:
        make_once(tmp_path / "model", make, print)
    assert (caught.value.error.code, caught.value.error.retryable) == (code, True)


def test_a_failed_attempt_leaves_no_directory_of_the_final_name(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "half").touch()
        raise ValueError("no more disk")

    with pytest.raises(ValueError, match="no more disk"):
        make_once(tmp_path / "model", fail, print)
    assert not (tmp_path / "model").exists()
    assert make_once(tmp_path / "model", lambda partial: (partial / "half").unlink(), print).is_dir()


def begun(partial: Path, age_s: float) -> Path:
    """A download that ended `age_s` seconds ago, in the middle of a file."""
    half = get_local_download_paths(partial, "model.safetensors").incomplete_path("0123.4567")
    half.write_bytes(b"half of it")
    for path in (*partial.rglob("*"), partial):
        os.utime(path, (time.time() - age_s,) * 2)
    return partial


def test_downloads_that_nobody_finishes_are_deleted_when_another_model_is_fetched(
    tmp_path: Path, settings: Settings, hub: SmallHub
) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    cache, old, new = settings.model_cache, 2 * ABANDONED_S, ABANDONED_S / 2
    places = (f"hub/acme--other/.{'a' * 40}.partial", "remote/.0123.partial", f".{smollm2.MODEL_NAME}-0.0.1-1.partial")
    abandoned = [begun(cache / place, old) for place in places]
    recent = begun(cache / "hub" / "acme--other" / f".{'b' * 40}.partial", new)
    of_user = begun(cache / ".mine.partial", old)
    resolve_model("acme/tiny", settings, print)
    assert [path for path in abandoned if path.exists()] == []
    assert list(recent.rglob("*.incomplete"))
    assert list(of_user.rglob("*.incomplete"))


def test_an_old_download_whose_lock_is_held_is_not_deleted(tmp_path: Path) -> None:
    partial = begun(tmp_path / ".model.partial", 2 * ABANDONED_S)
    with FileLock(lock_file(tmp_path / "model")):  # of another process: file locks know no threads
        delete_abandoned(tmp_path, [".*.partial"])
        assert list(partial.rglob("*.incomplete"))
    delete_abandoned(tmp_path, [".*.partial"])
    assert not partial.exists()


def test_a_download_whose_last_file_is_still_written_is_not_old(tmp_path: Path) -> None:
    """Also where its lock isn't seen, as on a shared file system that keeps locks per node."""
    partial = begun(tmp_path / ".model.partial", 2 * ABANDONED_S)
    (half,) = partial.rglob("*.incomplete")
    with half.open("ab") as stream:
        stream.write(b"and more")
    delete_abandoned(tmp_path, [".*.partial"])
    assert half.exists()


def test_what_can_t_be_cleaned_up_fails_no_job(tmp_path: Path, settings: Settings, hub: SmallHub) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    partial = begun(settings.model_cache / "remote" / ".0123.partial", 2 * ABANDONED_S)
    lock_file(settings.model_cache / "remote" / "0123").mkdir()
    inspect_model_dir(resolve_model("acme/tiny", settings, print))
    assert partial.exists()

"""A job goes on with the model it began with, or it says that it can't; never with another of the same name."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.power_cut import PowerCut
from tests.small_hub import SmallHub, small_hub
from tests.tiny_models import make_tiny_model
from trainers.errors import InfrastructureError, UserError
from trainers.models.pinned import PinnedModel, check_unchanged, fingerprints, pinned_model
from trainers.settings import Settings


class Job:
    """The part of a job that knows its model."""

    def __init__(self, root: Path, model: str) -> None:
        self.model = model
        self.settings = Settings(storage=root / "storage", model_roots=(root / "models",))
        self.file = root / "job" / "data" / "model.json"

    def starts(self) -> PinnedModel:
        """One of its runners, the first or a later one."""
        return pinned_model(self.model, self.file, self.settings, lambda _: None)

    def fails(self) -> str:
        """What the job's author is told when another runner finds the model changed."""
        with pytest.raises(UserError) as caught:
            self.starts()
        error = caught.value.error
        assert (error.code, error.param, error.retryable) == ("model_changed", "model", True)
        assert "/fine_tuning/jobs/resubmit" in error.message
        return error.message


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "models" / "mine")


def test_a_branch_that_moves_doesn_t_move_a_job(tmp_path: Path, hub: SmallHub) -> None:
    commit = hub.add("acme/tiny", make_tiny_model(tmp_path / "first"))
    job = Job(tmp_path, "acme/tiny")
    pinned = job.starts()
    assert pinned.name == f"acme/tiny@{commit}"
    newer = hub.add("acme/tiny", make_tiny_model(tmp_path / "second", seed=5))
    assert job.starts() == pinned
    shutil.rmtree(pinned.directory)
    assert job.starts() == pinned
    (tmp_path / "other").mkdir()
    assert Job(tmp_path / "other", "acme/tiny").starts().name == f"acme/tiny@{newer}"


def test_a_power_cut_doesn_t_move_a_job_either(tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    power_cut, job = PowerCut(monkeypatch), Job(tmp_path, str(local))
    job.starts()
    assert power_cut.leaves(job.file)


def test_a_job_with_its_model_in_the_cache_needs_the_hub_no_more(tmp_path: Path, hub: SmallHub) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    job = Job(tmp_path, "acme/tiny")
    pinned = job.starts()
    hub.repos.clear()
    hub.requests.clear()
    assert job.starts() == pinned
    assert hub.requests == []


def test_a_commit_that_is_gone_from_cache_and_hub_fails_the_job(tmp_path: Path, hub: SmallHub) -> None:
    commit = hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    job = Job(tmp_path, "acme/tiny")
    shutil.rmtree(job.starts().directory)
    del hub.repos["acme/tiny"].commits[commit]
    assert commit in job.fails()


def fail_to_read(file: Path) -> None:
    """Reading `file` fails from now on with an input/output error, as it does where a network disk is away."""
    file.unlink()
    file.symlink_to("/proc/self/mem")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_disk_that_fails_says_nothing_about_the_model(tmp_path: Path, hub: SmallHub, name: str) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    job = Job(tmp_path, "acme/tiny")
    pinned = job.starts()
    content = (pinned.directory / name).read_bytes()
    fail_to_read(pinned.directory / name)
    with pytest.raises(InfrastructureError, match="Input/output error") as caught:
        job.starts()
    assert (caught.value.error.code, caught.value.error.retryable) == ("model_unreachable", True)
    (pinned.directory / name).unlink()
    (pinned.directory / name).write_bytes(content)
    assert job.starts() == pinned


def test_a_directory_whose_disk_is_away_is_not_taken_for_one_that_is_gone(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, str(local))
    pinned = job.starts()
    stat = Path.stat

    def stale(path: Path, **how: bool) -> os.stat_result:
        if path == local:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return stat(path, **how)

    with monkeypatch.context() as away:
        away.setattr(Path, "stat", stale)
        with pytest.raises(InfrastructureError, match="Stale file handle"):
            job.starts()
    assert job.starts() == pinned


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_a_directory_by_now_is_a_change(tmp_path: Path, local: Path, name: str) -> None:
    job = Job(tmp_path, str(local))
    job.starts()
    (local / name).unlink()
    (local / name).mkdir()
    assert name in job.fails()


def test_a_local_model_that_stays_is_the_same(tmp_path: Path, local: Path) -> None:
    job = Job(tmp_path, str(local))
    pinned = job.starts()
    for file in local.iterdir():
        file.touch()
    (local / "README.md").write_text("what it is good for")
    assert job.starts() == pinned
    check_unchanged(pinned)


def test_weights_of_the_same_shapes_that_were_trained_meanwhile_are_noticed(tmp_path: Path, local: Path) -> None:
    job = Job(tmp_path, str(local))
    pinned = job.starts()
    make_tiny_model(local, seed=5)
    assert f"(model.safetensors of {local})" in job.fails()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_unchanged(pinned)


@pytest.mark.parametrize("row", [0, -1])
def test_a_single_tensor_that_was_trained_is_noticed(local: Path, row: int) -> None:
    before, file = fingerprints(local), local / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.q_proj.weight"][row] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    after = fingerprints(local)
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]


def test_another_config_or_chat_template_is_noticed_by_name(tmp_path: Path, local: Path) -> None:
    job = Job(tmp_path, str(local))
    job.starts()
    config = json.loads((local / "config.json").read_text())
    (local / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    (local / "chat_template.jinja").write_text("{{ messages }}")
    (local / "additional_chat_templates").mkdir()
    (local / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert "additional_chat_templates/tool_use.jinja, chat_template.jinja, config.json of" in job.fails()


def test_a_local_model_that_is_gone_fails_the_job_and_says_what_to_do(tmp_path: Path, local: Path) -> None:
    job = Job(tmp_path, str(local))
    job.starts()
    shutil.rmtree(local)
    assert f"there is no model directory {local}" in job.fails()


def test_a_link_that_leads_elsewhere_by_now_doesn_t_move_a_job(tmp_path: Path, local: Path) -> None:
    latest = tmp_path / "models" / "latest"
    latest.symlink_to(local)
    job = Job(tmp_path, str(latest))
    pinned = job.starts()
    latest.unlink()
    latest.symlink_to(make_tiny_model(tmp_path / "models" / "newer", seed=5))
    assert job.starts() == pinned
    assert pinned.directory == local

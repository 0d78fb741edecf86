"""From the name of a model to a directory: every kind of name, every way it can fail."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub._local_folder import get_local_download_paths, write_download_metadata

from tests.ports import free_ports
from tests.power_cut import PowerCut
from tests.small_hub import SmallHub
from tests.tiny_models import make_tiny_model
from tests.trainers.models.resolving import failure
from tests.waiting import WAIT_S, eventually
from trainers.errors import InfrastructureError, UserError
from trainers.models import smollm2
from trainers.models.architecture import inspect_model_dir
from trainers.models.hub import download
from trainers.models.names import ALIASES, HubModel, hub_model
from trainers.models.resolve import classify_model, resolve_model
from trainers.settings import Settings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("/data/model", "local"),
        ("./model", "local"),
        ("../model", "local"),
        ("~/model", "local"),
        ("file:///data/model", "local"),
        ("smollm2-135m-instruct", "alias"),
        ("Llama-3.2-1B-Instruct", "alias"),
        ("s3://bucket/model", "remote"),
        ("gs://bucket/model/", "remote"),
        ("meta-llama/Llama-3.2-1B", "hub"),
        ("Qwen/Qwen2.5-0.5B@refs/pr/3", "hub"),
        ("org/name@0123456789abcdef0123456789abcdef01234567", "hub"),
        ("org/name@a--branch..git", "hub"),
    ],
)
def test_a_model_name_says_what_it_is(model: str, kind: str) -> None:
    assert classify_model(model) == kind


BAD_NAMES = [
    "gpt2",
    "",
    " ",
    "a/b/c",
    "org/",
    "org/name@",
    "org/../name",
    "-org/name",
    "org/na me",
    "org/name\n",
    "órg/m",
    "org/name@" + 60 * "a/" + "b",
]
BAD_URIS = [
    "http://host/m",
    "s3://",
    "file://host/m",
    "s3://key:secret@bucket/m",
    "s3://bucket/m?version=1",
    "memory://m",
    "http://[/m",
    "s3://bucket/m::file:///etc",
]


@pytest.mark.parametrize("model", BAD_NAMES + BAD_URIS)
def test_a_name_that_is_none_of_these_is_refused(model: str) -> None:
    with pytest.raises(UserError) as caught:
        classify_model(model)
    assert (caught.value.error.code, caught.value.error.param) == ("invalid_value", "model")
    assert "secret" not in str(caught.value)


def test_a_name_that_is_none_of_these_is_answered_with_the_nearest_aliases_and_where_all_are_listed() -> None:
    with pytest.raises(UserError) as caught:
        classify_model("SmolLM-135M-Instruct")
    message = str(caught.value)
    meant = message.partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert meant[0] == "smollm2-135m-instruct"
    assert len(meant) == 3
    assert "GET /v1/models lists all" in message
    with pytest.raises(UserError) as caught:
        classify_model("x y z")
    assert not any(alias in str(caught.value) for alias in ALIASES)


def test_every_alias_stands_for_a_hub_id() -> None:
    assert all(classify_model(target) == "hub" for target in ALIASES.values())
    assert hub_model("phi-3-mini") == HubModel("microsoft/Phi-3-mini-4k-instruct", "main")
    assert hub_model("org/name@v2") == HubModel("org/name", "v2")


def test_a_local_directory_is_used_where_it_is(tmp_path: Path, settings: Settings, log: list[str]) -> None:
    model = make_tiny_model(tmp_path / "models" / "my model")
    assert resolve_model(str(model), settings, log.append) == model
    assert resolve_model(f"file://{str(model).replace(' ', '%20')}", settings, log.append) == model


def test_a_path_outside_the_roots_is_refused_even_through_a_link(tmp_path: Path, settings: Settings) -> None:
    outside = make_tiny_model(tmp_path / "outside")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link").symlink_to(outside)
    for model in (str(outside), str(tmp_path / "models" / "link"), str(tmp_path / "models" / ".." / "outside")):
        error = failure(model, settings).error
        assert error.code == "path_not_allowed"
        assert str(tmp_path) not in error.message.replace(model, "")  # where the roots are is nobody's business


def test_a_model_whose_files_are_links_to_outside_the_roots_is_refused(tmp_path: Path, settings: Settings) -> None:
    model = make_tiny_model(tmp_path / "models" / "linked")
    blobs = tmp_path / "models" / "blobs"
    blobs.mkdir()
    config = (model / "config.json").rename(blobs / "0a1b")
    (model / "config.json").symlink_to(config)  # the layout of Hugging Face's cache
    assert resolve_model(str(model), settings, lambda _: None) == model

    (tmp_path / "secret").write_text("s3cret")
    (model / "additional_chat_templates").mkdir()
    link = model / "additional_chat_templates" / "tools.jinja"
    link.symlink_to(tmp_path / "secret")
    error = failure(str(model), settings).error
    assert (error.code, error.param) == ("path_not_allowed", "model")
    assert error.message.startswith("additional_chat_templates/tools.jinja of ")
    assert str(tmp_path / "secret") not in error.message


def test_a_linked_folder_of_a_model_is_looked_into(tmp_path: Path, settings: Settings) -> None:
    model = make_tiny_model(tmp_path / "models" / "linked")
    templates = tmp_path / "models" / "templates"
    templates.mkdir()
    (model / "additional_chat_templates").symlink_to(templates)
    assert resolve_model(str(model), settings, lambda _: None) == model
    (tmp_path / "secret").write_text("s3cret")
    (templates / "tools.jinja").symlink_to(tmp_path / "secret")
    error = failure(str(model), settings).error
    assert error.code == "path_not_allowed"
    assert error.message.startswith("additional_chat_templates/tools.jinja of ")


def test_a_link_that_leads_nowhere_is_passed_over_unless_the_model_needs_it(tmp_path: Path, settings: Settings) -> None:
    model = make_tiny_model(tmp_path / "models" / "linked")
    (model / "dangling").symlink_to(model / "gone")
    (model / "in a circle").symlink_to(model / "in a circle")
    assert resolve_model(str(model), settings, lambda _: None) == model
    inspect_model_dir(model)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        kept = (model / name).rename(tmp_path / name)
        (model / name).symlink_to(model / name)
        assert resolve_model(str(model), settings, lambda _: None) == model
        with pytest.raises(UserError, match=name) as caught:
            inspect_model_dir(model)
        assert caught.value.error.code == "model_incomplete"
        (model / name).unlink()
        kept.rename(model / name)


def test_a_checkpoint_of_an_earlier_job_can_be_trained_on(settings: Settings) -> None:
    model = make_tiny_model(settings.job_dir("ftjob-1") / "checkpoints" / "step-00000040")
    assert resolve_model(str(model), settings, lambda _: None) == model


@pytest.mark.parametrize("model", ["/models/\0", "~nobody-of-that-name/model", "{root}/" + "m" * 300])
def test_a_path_that_cannot_be_one_is_not_found(model: str, settings: Settings) -> None:
    model = model.replace("{root}", str(settings.model_roots[0]))
    assert failure(model, settings).error.code == "model_not_found"


def test_a_missing_local_directory_is_not_found(tmp_path: Path, settings: Settings) -> None:
    assert failure(str(tmp_path / "models" / "nowhere"), settings).error.code == "model_not_found"


def test_a_hub_model_is_pinned_to_its_commit_and_the_log_says_which(
    tmp_path: Path, settings: Settings, hub: SmallHub, log: list[str]
) -> None:
    commit = hub.add("acme/tiny", make_tiny_model(tmp_path / "v1"))
    path = resolve_model("acme/tiny", settings, log.append)
    assert path.name == commit
    assert f"model acme/tiny: main is commit {commit}" in log
    inspect_model_dir(path)
    newer = hub.add("acme/tiny", make_tiny_model(tmp_path / "v2", seed=1))
    assert resolve_model("acme/tiny", settings, log.append).name == newer
    assert resolve_model(f"acme/tiny@{commit}", settings, log.append) == path


def test_a_cached_commit_is_not_downloaded_again(
    tmp_path: Path, settings: Settings, hub: SmallHub, log: list[str]
) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "v1"))
    resolve_model("acme/tiny", settings, log.append)
    hub.requests.clear()
    resolve_model("acme/tiny", settings, log.append)
    assert hub.downloads() == []


def test_only_what_a_model_needs_is_downloaded(tmp_path: Path, settings: Settings, hub: SmallHub) -> None:
    source = make_tiny_model(tmp_path / "source")
    for name in (
        "pytorch_model.bin",
        "modeling_evil.py",
        "README.md",
        "consolidated.safetensors",
        "original/model.safetensors",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"x")
    (source / "LICENSE").write_text("free")
    hub.add("acme/tiny", source)
    path = resolve_model("acme/tiny", settings, lambda _: None)
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    expected = {"config.json", "generation_config.json", "model.safetensors", "LICENSE"} | tokenizer
    assert {str(file.relative_to(path)) for file in path.rglob("*")} == expected


def test_an_architecture_that_cannot_be_trained_costs_no_download(
    tmp_path: Path, settings: Settings, hub: SmallHub
) -> None:
    hub.add("acme/gpt", make_tiny_model(tmp_path / "gpt", model_type="gpt2", architectures=["GPT2LMHeadModel"]))
    assert "GPT2LMHeadModel" in str(failure("acme/gpt", settings))
    assert hub.downloads() == ["config.json"]


@pytest.mark.parametrize(("model", "named"), [("acme/none", "acme/none"), ("acme/tiny@nope", "'nope'")])
def test_what_the_hub_does_not_have_is_the_users_fault(
    model: str, named: str, tmp_path: Path, settings: Settings, hub: SmallHub
) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    error = failure(model, settings)
    assert (error.error.code, error.error.fault) == ("model_not_found", "user")
    assert named in str(error)


def test_a_gated_model_needs_a_token_and_opens_with_it(
    tmp_path: Path, settings: Settings, hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/gated", make_tiny_model(tmp_path / "source"), gated=True)
    error = failure("acme/gated", settings)
    assert (error.error.code, error.error.fault) == ("model_access_denied", "user")
    assert "HF_TOKEN" in str(error)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    inspect_model_dir(resolve_model("acme/gated", settings, lambda _: None))


def test_files_that_a_token_may_not_read_are_no_fault_of_the_network(
    tmp_path: Path, settings: Settings, hub: SmallHub
) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    hub.closed = "Please enable access to public gated repositories in your token's settings."
    error = failure("acme/tiny", settings)
    assert (error.error.code, error.error.fault) == ("model_access_denied", "user")
    assert f"{hub.closed} Check the workers' HF_TOKEN." in str(error)


def test_an_unreachable_hub_is_not_the_users_fault(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_ports(1)[0]}")
    error = failure("acme/tiny", settings)
    assert isinstance(error, InfrastructureError)
    assert error.error.code == "hub_unreachable"
    assert "HF_ENDPOINT" in str(error)


def test_a_hub_that_takes_a_request_and_never_answers_is_unreachable(
    tmp_path: Path, settings: Settings, hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    with monkeypatch.context() as hasty:
        hasty.setattr("trainers.models.hub.ANSWER_S", 0.5)
        hub.silent = "/revision/"
        assert failure("acme/tiny", settings).error.code == "hub_unreachable"
    hub.silent = "/tree/"  # nothing is asked for there, as that answer would be waited for without a limit
    path = resolve_model("acme/tiny", settings, lambda _: None)
    monkeypatch.setattr("trainers.models.hub.ANSWER_S", 0.5)
    hub.silent = "/"
    assert (path.name, resolve_model("acme/tiny", settings, lambda _: None)) == (commit, path)


def test_while_the_hub_is_down_the_last_known_commit_serves(
    tmp_path: Path, settings: Settings, hub: SmallHub, log: list[str]
) -> None:
    commit = hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    path = resolve_model("acme/tiny", settings, log.append)
    hub.broken = True
    assert resolve_model("acme/tiny", settings, log.append) == path
    assert f"Using commit {commit}" in log[-1]
    assert resolve_model(f"acme/tiny@{commit}", settings, log.append) == path
    assert failure("acme/tiny@v2", settings).error.code == "hub_unreachable"


def test_a_revision_cannot_lead_out_of_the_cache_while_the_hub_is_down(
    tmp_path: Path, settings: Settings, hub: SmallHub
) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    home = resolve_model("acme/tiny", settings, lambda _: None).parent
    outside = make_tiny_model(tmp_path / "outside")
    hub.broken = True
    for revision in ("refs", f"refs/{'../' * len(home.parts)}{outside}", "refs/../../../../../outside"):
        assert failure(f"acme/tiny@{revision}", settings).error.code in ("hub_unreachable", "invalid_value")


def test_a_name_that_huggingface_hub_refuses_is_no_fault_of_the_hub(settings: Settings, hub: SmallHub) -> None:
    """Whatever a later release of it refuses."""
    with pytest.raises(UserError) as caught:
        download(HubModel("org/my--model"), settings.model_cache, lambda _: None)
    assert (caught.value.error.code, caught.value.error.param) == ("invalid_value", "model")
    assert "Cannot have -- or .." in str(caught.value)
    assert hub.requests == []


def test_an_unreachable_hubs_password_is_not_shown(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:s3cret@127.0.0.1:{free_ports(1)[0]}")
    error = failure("acme/tiny", settings)
    assert error.error.code == "hub_unreachable"
    assert "s3cret" not in str(error)


def test_a_download_that_died_is_finished_by_the_next_one(tmp_path: Path, settings: Settings, hub: SmallHub) -> None:
    commit = hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    partial = settings.model_cache / "hub" / "acme--tiny" / f".{commit}.partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{ half a fi")
    path = resolve_model("acme/tiny", settings, lambda _: None)
    inspect_model_dir(path)
    assert not partial.exists()


def test_incomplete_files_of_a_killed_download_are_deleted_before_the_next_one(
    tmp_path: Path, settings: Settings, hub: SmallHub
) -> None:
    commit = hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    partial = settings.model_cache / "hub" / "acme--tiny" / f".{commit}.partial"
    begun = get_local_download_paths(partial, "model.safetensors").incomplete_path("0123.4567")
    begun.write_bytes(b"gigabytes")
    hub.closed = "not now"
    assert failure("acme/tiny", settings).error.code == "model_access_denied"
    assert not begun.exists()


def test_a_file_that_a_power_cut_has_left_empty_is_fetched_again(
    tmp_path: Path, settings: Settings, hub: SmallHub
) -> None:
    """huggingface_hub renames what it has downloaded, and takes the name for the whole file from then on."""
    source = make_tiny_model(tmp_path / "source")
    commit = hub.add("acme/tiny", source)
    partial = settings.model_cache / "hub" / "acme--tiny" / f".{commit}.partial"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        write_download_metadata(partial, name, commit, "etag")
        shutil.copyfile(source / name, partial / name)
    for name in ("model.safetensors", "config.json"):
        os.truncate(partial / name, 0)
    model = resolve_model("acme/tiny", settings, print)
    assert [(model / file.name).read_bytes() == file.read_bytes() for file in source.iterdir()].count(False) == 0
    assert "tokenizer.json" not in hub.downloads()


def test_of_a_mirror_that_tells_no_sizes_files_that_are_there_are_not_fetched_again(
    tmp_path: Path, settings: Settings, hub: SmallHub
) -> None:
    source = make_tiny_model(tmp_path / "source")
    commit = hub.add("acme/tiny", source)
    hub.tells_sizes = False
    partial = settings.model_cache / "hub" / "acme--tiny" / f".{commit}.partial"
    write_download_metadata(partial, "model.safetensors", commit, "etag")
    shutil.copyfile(source / "model.safetensors", partial / "model.safetensors")
    inspect_model_dir(resolve_model("acme/tiny", settings, print))
    assert "tokenizer.json" in hub.downloads()
    assert "model.safetensors" not in hub.downloads()


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EIO, "storage_unreachable"), (errno.ENOSPC, "storage_full"), (errno.ETIMEDOUT, "hub_unreachable")],
)
def test_a_disk_that_fails_under_a_download_is_not_taken_for_the_hub(
    tmp_path: Path, settings: Settings, hub: SmallHub, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))

    def fails(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    assert failure("acme/tiny", settings).error.code == code


def test_what_a_branch_meant_last_outlasts_a_power_cut(
    tmp_path: Path, settings: Settings, hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    power_cut = PowerCut(monkeypatch)
    resolve_model("acme/tiny", settings, print)
    remembered = settings.model_cache / "hub" / "acme--tiny" / "refs" / "main"
    assert remembered.read_text().strip() == commit
    assert power_cut.leaves_content(remembered)


STOPPED = """
import signal, sys
from pathlib import Path
from trainers import __main__
from trainers.running import runner
from trainers.models.resolve import resolve_model
from trainers.settings import Settings

def run(job_id, settings):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as the runner does
    resolve_model("acme/tiny", settings, print)

runner.run = run  # without Ray
sys.exit(__main__.main(["run", "ftjob-1"]))
"""


def test_a_runner_that_is_stopped_does_not_wait_for_what_it_downloads(tmp_path: Path, hub: SmallHub) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    hub.silent = "model.safetensors"
    env = os.environ | {"TUNEWRIGHT_STORAGE": str(tmp_path / "storage"), "HF_HUB_DOWNLOAD_TIMEOUT": "600"}
    with subprocess.Popen([sys.executable, "-c", STOPPED], cwd=ROOT, env=env) as process:
        eventually(
            lambda: any("model.safetensors" in request for request in hub.requests),
            WAIT_S,
            lambda: f"it downloads nothing: {hub.requests}",
        )
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(WAIT_S) == 130
        finally:
            process.kill()


def test_the_demo_alias_means_the_installed_package(
    settings: Settings, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = []
    monkeypatch.setattr(smollm2, "convert", lambda source, out: converted.append((source.suffix, make_tiny_model(out))))
    path = resolve_model("SmolLM2-135M-Instruct", settings, log.append)
    assert path == resolve_model("smollm2-135m-instruct", settings, log.append)
    assert len(converted) == 1
    assert path.parent == settings.model_cache


def test_without_the_package_the_demo_alias_means_the_hub(
    tmp_path: Path, settings: Settings, hub: SmallHub, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: None)
    commit = hub.add("HuggingFaceTB/SmolLM2-135M-Instruct", make_tiny_model(tmp_path / "source"))
    assert resolve_model("smollm2-135m-instruct", settings, log.append).name == commit
    assert log[0] == "smollm2-135m-instruct stands for HuggingFaceTB/SmolLM2-135M-Instruct"

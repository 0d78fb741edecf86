"""Models on an object store, and which of the files there, or on a hub, are fetched."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors.numpy import load_file, save_file

from tests.full_disk import full_disk
from tests.small_hub import SmallHub
from tests.tiny_models import make_tiny_model
from tests.trainers.models.resolving import failure
from trainers.errors import UserError
from trainers.models.architecture import inspect_model_dir
from trainers.models.model_files import weight_files
from trainers.models.resolve import resolve_model
from trainers.settings import Settings


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Path]:
    """A directory that answers to s3://; the store's own client is not what is tested here."""
    root = tmp_path / "store"

    class Bucket(DirFileSystem):  # type: ignore[misc]  # fsspec has no types
        cachable = False

        def __init__(self, **_: Any) -> None:
            super().__init__(path=str(root), fs=LocalFileSystem())

        def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
            """With what a store's web page leaves where a folder was made with it."""
            found = super().ls(path, detail=detail, **more)
            return [{"name": f"{path}/", "type": "file", "size": 0}, *found] if detail else found

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("s3://").rstrip("/")

    real = fsspec.get_filesystem_class("s3")
    fsspec.register_implementation("s3", Bucket, clobber=True)
    yield root / "bucket"
    fsspec.register_implementation("s3", real, clobber=True)


def test_a_model_on_a_store_is_copied_once_and_again_when_it_changes(
    bucket: Path, settings: Settings, log: list[str]
) -> None:
    make_tiny_model(bucket / "model")
    (bucket / "model" / "notes.txt").write_text("not part of a model")
    path = resolve_model("s3://bucket/model", settings, log.append)
    assert inspect_model_dir(path).family == "llama"
    assert not (path / "notes.txt").exists()
    assert resolve_model("s3://bucket/model/", settings, log.append) == path
    assert len(log) == 1
    make_tiny_model(bucket / "model", num_hidden_layers=1)
    assert inspect_model_dir(resolve_model("s3://bucket/model", settings, log.append)).num_layers == 1


def rewritten(model: Path) -> None:
    make_tiny_model(model, rope_theta=5e5)


def without_a_file(model: Path) -> None:
    (model / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("change", [rewritten, without_a_file])
def test_a_model_that_changes_while_it_is_copied_is_not_taken_for_either(
    bucket: Path, settings: Settings, change: Callable[[Path], None]
) -> None:
    make_tiny_model(bucket / "model")
    with pytest.raises(UserError) as caught:
        resolve_model("s3://bucket/model", settings, lambda _: change(bucket / "model"))
    assert (caught.value.error.code, caught.value.error.retryable) == ("model_changed", True)
    path = resolve_model("s3://bucket/model", settings, lambda _: None)
    assert (path / "config.json").read_text() == (bucket / "model" / "config.json").read_text()
    assert list(path.parent.glob(".*.partial")) == []


def test_a_model_on_a_store_comes_with_all_its_chat_templates(bucket: Path, settings: Settings) -> None:
    templates = make_tiny_model(bucket / "model") / "additional_chat_templates"
    for name in ("tool_use.jinja", "drafts/rag.jinja", "../checkpoints/config.json"):
        (templates / name).parent.mkdir(exist_ok=True)
        (templates / name).write_text("{{ tools }}")
    path = resolve_model("s3://bucket/model", settings, lambda _: None)
    copied = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and "template" in str(file)}
    assert copied == {"additional_chat_templates/tool_use.jinja"}
    assert not (path / "checkpoints").exists()
    (templates / "tool_use.jinja").write_text("{{ messages }}{{ tools }}")
    newer = resolve_model("s3://bucket/model", settings, lambda _: None)
    assert (newer / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}{{ tools }}"


def test_a_disk_that_is_full_is_no_fault_of_the_hub_or_the_store(
    tmp_path: Path, bucket: Path, settings: Settings, hub: SmallHub
) -> None:
    hub.add("acme/tiny", make_tiny_model(tmp_path / "source"))
    make_tiny_model(bucket / "model")
    for model in ("acme/tiny", "s3://bucket/model"):
        with full_disk(20_000):
            error = failure(model, settings).error
        assert (error.code, error.fault, error.retryable) == ("storage_full", "infrastructure", True)
        path = resolve_model(model, settings, lambda _: None)
        inspect_model_dir(path)
        with full_disk(10):
            assert resolve_model(model, settings, lambda _: None) == path


def several_models(path: Path, named: str) -> Path:
    """A directory of three models, of which config.json names one: a file, or the index of two."""
    source = make_tiny_model(path, transformers_weights=named)
    weights = load_file(source / "model.safetensors")
    save_file(weights, source / "tuned.safetensors", metadata={"format": "pt"})
    save_file(weights, source / "original.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"half-{i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in weights.items() if weight_map[name] == file}
        save_file(part, source / file, metadata={"format": "pt"})
    (source / "halves.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source


def test_a_disk_that_fails_under_a_copy_is_not_taken_for_the_store(bucket: Path, settings: Settings) -> None:
    make_tiny_model(bucket / "model")
    path = resolve_model("s3://bucket/model", settings, lambda _: None)
    shutil.rmtree(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir()
    (partial / "tokenizer.json").symlink_to("/proc/self/mem")  # writing to its beginning is an input/output error
    error = failure("s3://bucket/model", settings).error
    assert (error.code, error.fault) == ("storage_unreachable", "infrastructure")


NAMED_WEIGHTS = [
    ("tuned.safetensors", ["tuned.safetensors"]),
    ("halves.safetensors.index.json", ["half-0.safetensors", "half-1.safetensors"]),
]


@pytest.mark.parametrize(("named", "files"), NAMED_WEIGHTS)
def test_of_a_hub_model_the_weights_that_its_config_names_are_downloaded(
    tmp_path: Path, settings: Settings, hub: SmallHub, named: str, files: list[str]
) -> None:
    hub.add("acme/several", several_models(tmp_path / "source", named))
    path = resolve_model("acme/several", settings, lambda _: None)
    inspect_model_dir(path)
    assert [file.name for file in weight_files(path)] == files
    assert {file.name for file in path.glob("*.safetensors*")} == {named, *files}


@pytest.mark.parametrize(("named", "files"), NAMED_WEIGHTS)
def test_of_a_model_on_a_store_the_weights_that_its_config_names_are_copied(
    bucket: Path, settings: Settings, named: str, files: list[str]
) -> None:
    source = several_models(bucket / "model", named)
    path = resolve_model("s3://bucket/model", settings, lambda _: None)
    inspect_model_dir(path)
    assert [file.name for file in weight_files(path)] == files
    assert {file.name for file in path.glob("*.safetensors*")} == {named, *files}
    save_file(load_file(source / files[0]), source / files[0], metadata={"format": "pt", "of": "another day"})
    assert resolve_model("s3://bucket/model", settings, lambda _: None) != path


@pytest.mark.parametrize("named", ["../other/model.safetensors", "pytorch_model.bin", "gone.safetensors", 7])
def test_weights_that_a_config_names_and_that_can_t_be_fetched_cost_no_download(
    tmp_path: Path, bucket: Path, settings: Settings, hub: SmallHub, named: object
) -> None:
    hub.add("acme/several", make_tiny_model(tmp_path / "source", transformers_weights=named))
    make_tiny_model(bucket / "model", transformers_weights=named)
    for model in ("acme/several", "s3://bucket/model"):
        error = failure(model, settings).error
        assert error.code == "model_incomplete"
        assert error.message.startswith(model)
        assert "transformers_weights" in error.message
    assert hub.downloads() == ["config.json"]


def sharded(path: Path, names: tuple[str, str]) -> Path:
    """A model in two files of these names, and their index."""
    weights = load_file(make_tiny_model(path) / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {name: names[number % 2] for number, name in enumerate(sorted(weights))}
    for file in names:
        part = {name: tensor for name, tensor in weights.items() if weight_map[name] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_shards_are_fetched_by_the_names_that_their_index_has(
    tmp_path: Path, bucket: Path, settings: Settings, hub: SmallHub
) -> None:
    names = ("pytorch_model-00001-of-00002.safetensors", "pytorch_model-00002-of-00002.safetensors")
    sharded(bucket / "model", names)
    (bucket / "model" / "model-extra.safetensors").write_bytes(b"not of this model")
    hub.add("acme/shards", bucket / "model")
    for model in ("acme/shards", "s3://bucket/model"):
        path = resolve_model(model, settings, lambda _: None)
        inspect_model_dir(path)
        assert sorted(file.name for file in path.glob("*.safetensors")) == list(names)


def test_an_index_that_names_a_shard_which_is_not_there_costs_no_download(
    tmp_path: Path, bucket: Path, settings: Settings, hub: SmallHub
) -> None:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (sharded(bucket / "model", names) / names[1]).unlink()
    hub.add("acme/shards", bucket / "model")
    for model in ("acme/shards", "s3://bucket/model"):
        error = failure(model, settings).error
        assert error.code == "model_incomplete"
        assert error.message.startswith(model)
        assert names[1] in error.message
    assert hub.downloads() == ["config.json", "model.safetensors.index.json"]


def test_of_a_model_in_one_file_and_in_shards_the_one_file_is_fetched(
    tmp_path: Path, bucket: Path, settings: Settings, hub: SmallHub
) -> None:
    """As transformers prefers it."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    make_tiny_model(tmp_path / "one")
    sharded(bucket / "model", names)
    (tmp_path / "one" / "model.safetensors").rename(bucket / "model" / "model.safetensors")
    hub.add("acme/both", bucket / "model")
    for model in ("acme/both", "s3://bucket/model"):
        path = resolve_model(model, settings, lambda _: None)
        inspect_model_dir(path)
        assert [file.name for file in path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_model_without_safetensors_is_incomplete(
    tmp_path: Path, bucket: Path, settings: Settings, hub: SmallHub
) -> None:
    for source in (tmp_path / "source", bucket / "pickled"):
        make_tiny_model(source)
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
    hub.add("acme/pickled", tmp_path / "source")
    for model in ("acme/pickled", "s3://bucket/pickled"):
        error = failure(model, settings)
        assert error.error.code == "model_incomplete"
        assert "pickle" in str(error)


def test_what_a_store_does_not_have_is_named(bucket: Path, settings: Settings) -> None:
    assert failure("s3://bucket/none", settings).error.code == "model_not_found"
    (bucket / "empty").mkdir(parents=True)
    assert failure("s3://bucket/empty", settings).error.code == "model_incomplete"


def test_what_a_stores_library_says_is_not_repeated(
    bucket: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model(bucket / "model")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("GET https://bucket/model?X-Amz-Signature=s3cret")

    monkeypatch.setattr(DirFileSystem, "open", fail)
    error = failure("s3://bucket/model", settings)
    assert error.error.code == "model_unreachable"
    assert "ConnectionError" in str(error)
    assert "s3cret" not in str(error)

"""Checkpoints: what is loaded and saved again is the same to the bit, and readable by whoever comes next."""

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import FAMILIES, make_tiny_model
from trainers.errors import UserError
from trainers.models.architecture import inspect_model_dir
from trainers.models.decoder import build_decoder
from trainers.models.model_files import weight_files
from trainers.models.weights import load_weights, save_hf_model


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_and_saving_changes_no_bit(family: str, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in", family)
    arch = inspect_model_dir(source)
    save_hf_model(load_weights(source, arch), arch, source, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_decoder(family: str, tmp_path: Path) -> None:
    arch = inspect_model_dir(make_tiny_model(tmp_path, family))
    with torch.device("meta"):
        expected = build_decoder(arch).state_dict()
    found = load_weights(tmp_path, arch)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }


def test_a_large_model_is_saved_in_shards_with_an_index(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in")
    arch = inspect_model_dir(source)
    weights = load_weights(source, arch)
    save_hf_model(weights, arch, source, tmp_path / "out", max_shard_bytes=150_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 3
    assert shards[0] == "model-00001-of-00003.safetensors"
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    again = load_weights(tmp_path / "out", inspect_model_dir(tmp_path / "out"))
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def several_models(folder: Path) -> dict[str, torch.Tensor]:
    """A directory that holds one model as a single file, one in shards and a third under a name of its own; the final
    norm of each."""
    seeds = {"single": 0, "shards": 1, "named": 2}
    norms = {}
    for name, seed in seeds.items():
        source = make_tiny_model(folder.with_name(name), seed=seed)
        arch = inspect_model_dir(source)
        weights = load_weights(source, arch)
        norms[name] = weights["norm.scale"].clone()
        # As save_pretrained() leaves it when a smaller model is saved where a larger one was, or the other way round.
        save_hf_model(weights, arch, source, folder, max_shard_bytes=150_000 if name == "shards" else 10**9)
        if name == "named":
            (folder / "model.safetensors").rename(folder / "named.safetensors")
        elif name == "single":
            (folder / "model.safetensors").rename(folder / "kept")
    (folder / "kept").rename(folder / "model.safetensors")
    return norms


def test_of_a_directory_with_several_models_the_one_that_transformers_loads_is_trained(tmp_path: Path) -> None:
    norms = several_models(tmp_path / "model")

    def loaded() -> torch.Tensor:
        return load_weights(tmp_path / "model", inspect_model_dir(tmp_path / "model"))["norm.scale"]

    assert torch.equal(loaded(), norms["single"])
    config = tmp_path / "model" / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"transformers_weights": "named.safetensors"}))
    assert torch.equal(loaded(), norms["named"])
    config.write_text(json.dumps(plain | {"transformers_weights": "model.safetensors.index.json"}))
    assert torch.equal(loaded(), norms["shards"])
    config.write_text(json.dumps(plain))
    (tmp_path / "model" / "model.safetensors").unlink()
    assert torch.equal(loaded(), norms["shards"])


def test_an_index_without_its_shards_is_no_fault_beside_the_single_file(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(source) == [source / "model.safetensors"]


@pytest.mark.parametrize("name", ["../other/model.safetensors", "pytorch_model.bin", "gone.safetensors", 7])
def test_weights_that_a_config_names_must_be_safetensors_beside_it(tmp_path: Path, name: object) -> None:
    make_tiny_model(tmp_path / "other")
    source = make_tiny_model(tmp_path / "model", transformers_weights=name)
    with pytest.raises(UserError, match="transformers_weights") as caught:
        inspect_model_dir(source)
    assert caught.value.error.code == "model_incomplete"


def test_an_export_of_weights_with_a_name_of_their_own_has_the_usual_one(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in", transformers_weights="tuned.safetensors")
    (source / "model.safetensors").rename(source / "tuned.safetensors")
    arch = inspect_model_dir(source)
    save_hf_model(load_weights(source, arch), arch, source, tmp_path / "out")
    assert weight_files(tmp_path / "out") == [tmp_path / "out" / "model.safetensors"]


def test_an_export_says_its_dtype_and_keeps_the_rest_of_the_config(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in", my_own_key=[1, 2])
    arch = inspect_model_dir(source)
    weights = {name: value.to(torch.bfloat16) for name, value in load_weights(source, arch).items()}
    save_hf_model(weights, arch, source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_an_export_names_its_architecture_even_if_the_base_does_not(tmp_path: Path) -> None:
    """vLLM chooses the model class by it."""
    source = make_tiny_model(tmp_path / "in", architectures=None)
    arch = inspect_model_dir(source)
    save_hf_model(load_weights(source, arch), arch, source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_an_export_has_the_tokenizer_and_the_licence_and_is_readable_by_everyone(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE.txt").write_text("as the model's family calls it")
    (source / "optimizer.bin").write_bytes(b"not part of a model")
    arch = inspect_model_dir(source)
    save_hf_model(load_weights(source, arch), arch, source, tmp_path / "out")
    files = {file.name: file for file in (tmp_path / "out").iterdir()}
    assert files.keys() == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE.txt",
    }
    assert {stat.S_IMODE(file.stat().st_mode) for file in files.values()} == {0o644}
    assert files["tokenizer.json"].read_bytes() == (source / "tokenizer.json").read_bytes()


def test_an_export_has_the_additional_chat_templates_and_nothing_else_from_their_folder(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in")
    templates = source / "additional_chat_templates"
    (templates / "drafts").mkdir(parents=True)
    (tmp_path / "secret").write_text("s3cret")
    (templates / "drafts" / "link.jinja").symlink_to(tmp_path / "secret")  # deeper than links are checked
    (templates / "notes.txt").write_text("no template")
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "tool_use.jinja").chmod(0o600)
    arch = inspect_model_dir(source)
    save_hf_model(load_weights(source, arch), arch, source, tmp_path / "out")
    (template,) = (tmp_path / "out" / "additional_chat_templates").rglob("*")
    assert (template.name, template.read_text()) == ("tool_use.jinja", "{{ tools }}")
    assert stat.S_IMODE(template.stat().st_mode) == 0o644


def test_training_on_loaded_weights_never_writes_to_the_file(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path)
    before = (source / "model.safetensors").read_bytes()
    for value in load_weights(source, inspect_model_dir(source)).values():
        value.zero_()
    assert (source / "model.safetensors").read_bytes() == before


def test_a_copy_of_the_tied_head_is_accepted_only_if_it_is_one(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path)
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
    assert "output.weight" not in load_weights(source, inspect_model_dir(source))
    save_file(tensors | {"lm_head.weight": head + 1}, source / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_weights(source, inspect_model_dir(source))


def test_rotary_tables_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, source / "model.safetensors")
    assert len(load_weights(source, inspect_model_dir(source))) == len(tensors)


def test_weights_that_are_not_floating_point_are_refused(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match="is stored as I8"):
        inspect_model_dir(source)

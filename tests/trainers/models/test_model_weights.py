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


def test_an_export_says_its_dtype_and_keeps_the_rest_of_the_config(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in", my_own_key=[1, 2])
    arch = inspect_model_dir(source)
    save_hf_model(load_weights(source, arch), arch, source, tmp_path / "out", torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


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

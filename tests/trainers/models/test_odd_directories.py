"""Model directories as others leave them: each can be chatted with and exported, or is refused by what is wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import CHATML, make_tiny_model
from trainers.answers import Piece, Question, Sampling
from trainers.data.chat import ChatTokenizer
from trainers.errors import UserError
from trainers.models.architecture import inspect_model_dir
from trainers.models.chat_model import ChatModel
from trainers.models.pinned import fingerprints
from trainers.models.weights import load_weights
from trainers.training.export import export_model

ASKED = ({"role": "user", "content": "where is it"},)
ANSWER_TOKENS = 40


def answer(directory: Path) -> list[Piece]:
    model = ChatModel.load(directory)
    question = Question("any", ASKED, ANSWER_TOKENS, sampling=Sampling(temperature=2, seed=3))
    under_way, pieces = model.begin(model.prompt(question), question), list[Piece]()
    while not pieces or pieces[-1].end is None:
        (piece,) = model.advance([under_way])
        assert isinstance(piece, Piece)
        pieces.append(piece)
    return pieces


def exported(directory: Path) -> Path:
    arch, out = inspect_model_dir(directory), directory.with_name("out")
    export_model(load_weights(directory, arch), arch, directory, out)
    return out


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        ChatModel.load(directory)
    assert (caught.value.error.code, caught.value.error.param) == ("model_incomplete", "model")
    return str(caught.value)


def change(file: Path, **keys: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    changed = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def test_a_directory_of_links_as_in_hugging_face_s_cache(tmp_path: Path) -> None:
    blobs = make_tiny_model(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert answer(tmp_path / "snapshot") == answer(blobs)
    out = exported(tmp_path / "snapshot")
    assert not any(file.is_symlink() for file in out.iterdir())
    assert answer(out) == answer(blobs)


def test_a_vocabulary_with_rows_beyond_the_tokenizer(tmp_path: Path) -> None:
    """As Qwen's, which is padded to a multiple of 128. A row without a token may be sampled; it has no text."""
    model = make_tiny_model(tmp_path / "model", vocab_size=4096)
    pieces = answer(model)
    assert len(pieces) == ANSWER_TOKENS
    assert sum(not piece.text for piece in pieces) > ANSWER_TOKENS / 2
    assert answer(exported(model)) == pieces


def test_a_tied_model_that_stores_its_head(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    before, tensors = answer(model), load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert answer(model) == before
    out = exported(model)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert answer(out) == before
    save_file(tensors | {"lm_head.weight": torch.zeros(512, 64)}, model / "model.safetensors", {"format": "pt"})
    assert "an lm_head.weight that differs" in refusal(model)


def test_an_untied_model_that_lacks_its_head(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    change(model / "config.json", tie_word_embeddings=None)  # which means false for a Llama
    assert "the weights lack lm_head.weight" in refusal(model)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    weight_map = dict.fromkeys(load_file(model / "model.safetensors"), "model-00001-of-00002.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert answer(model)
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "model-00002-of-00002.safetensors"}}))
    assert "lacks the weight files model-00002-of-00002.safetensors" in refusal(model)


def template_in_a_file(model: Path) -> None:
    """As newer releases of transformers write it."""
    (model / "chat_template.jinja").write_text(CHATML)
    change(model / "tokenizer_config.json", chat_template=None)


def templates_in_files(model: Path) -> None:
    template_in_a_file(model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")


def list_of_templates(model: Path) -> None:
    named = {"tool_use": "{{ tools }}", "default": CHATML}
    entries = [{"name": name, "template": source} for name, source in named.items()]
    change(model / "tokenizer_config.json", chat_template=entries)


@pytest.mark.parametrize("kept", [template_in_a_file, templates_in_files, list_of_templates])
def test_wherever_the_chat_template_is_kept_it_is_used_and_exported(
    tmp_path: Path, kept: Callable[[Path], None]
) -> None:
    model = make_tiny_model(tmp_path / "model")
    before = answer(model)
    kept(model)
    assert answer(model) == before
    out = exported(model)
    assert answer(out) == before
    tokenizers = [ChatTokenizer.from_dir(directory) for directory in (model, out)]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint


def test_several_ids_that_end_generation_are_all_exported_and_end_answers(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    change(model / "generation_config.json", eos_token_id=list(range(2, 300)))
    out = exported(model)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == list(range(2, 300))
    pieces = answer(out)
    assert (pieces[-1].end, len(pieces) < ANSWER_TOKENS) == ("stop", True)


def test_what_is_no_file_is_no_template(tmp_path: Path) -> None:
    """Reading a pipe would never end."""
    model = make_tiny_model(tmp_path / "model")
    template_in_a_file(model)
    before = fingerprints(model)
    templates = model / "additional_chat_templates"
    (templates / "folder.jinja").mkdir(parents=True)
    os.mkfifo(templates / "pipe.jinja")
    os.mkfifo(model / "special_tokens_map.json")
    assert fingerprints(model) == before
    (model / "special_tokens_map.json").unlink()
    assert answer(exported(model)) == answer(model)

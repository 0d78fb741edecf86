"""Exports: the generation config, and the other files that inference needs besides the weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import make_tiny_model
from tests.trainers.recipe_support import Case, make_plan_for, random_rows, write_rows
from trainers.data.chat import ChatTokenizer
from trainers.models.architecture import inspect_model_dir
from trainers.models.weights import load_weights
from trainers.training.export import export_model


def base_model(path: Path, **config: Any) -> Path:
    """A model like many published base models: a text ends with `<|endoftext|>` (0), and its chat template, with which
    it wasn't trained, ends turns with `<|im_end|>` (2)."""
    model = make_tiny_model(path, "qwen2", eos_token_id=0, bos_token_id=0, **config)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "<|endoftext|>"}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "max_new_tokens": 2048}))
    return model


def list_control_tokens(model: Path, listed: dict[str, Any]) -> Path:
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": listed}))
    return model


def exported(model: Path, out: Path) -> dict[str, Any]:
    """The generation config of an export of `model`."""
    arch = inspect_model_dir(model)
    export_model(load_weights(model, arch), arch, model, out)
    found: dict[str, Any] = json.loads((out / "generation_config.json").read_text())
    return found


def test_an_exported_base_model_ends_its_answer_where_it_was_trained_to(tmp_path: Path) -> None:
    found = exported(base_model(tmp_path / "base"), tmp_path / "out")
    assert found == {"eos_token_id": [0, 2], "max_new_tokens": 2048}
    assert (tmp_path / "out" / "generation_config.json").stat().st_mode & 0o777 == 0o644


def test_the_ends_are_found_without_the_vocabulary_where_the_control_tokens_are_listed(tmp_path: Path) -> None:
    model = base_model(tmp_path / "base")
    known = ChatTokenizer.from_dir(model)
    texts = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    list_control_tokens(model, {str(id_): {"content": text, "special": True} for id_, text in enumerate(texts)})
    (model / "tokenizer.json").unlink()
    light = ChatTokenizer.from_dir(model, whole=False)
    assert (light.eos_ids, light.template) == (known.eos_ids, known.template) == ((0, 2), known.template)


def test_the_end_of_a_turn_that_only_the_vocabulary_has_is_found_there(tmp_path: Path) -> None:
    model = list_control_tokens(base_model(tmp_path / "base"), {"0": {"content": "<|endoftext|>", "special": True}})
    assert exported(model, tmp_path / "out")["eos_token_id"] == [0, 2]


@pytest.mark.parametrize(
    "broken",
    [
        {"2": {"special": True}},
        {"2": {"content": None, "special": True}},
        {"2": {"content": ["<|im_end|>"], "special": True}},
        {"two": {"content": "<|im_end|>", "special": True}},
        {"-2": {"content": "<|im_end|>", "special": True}},
        {f"{1 << 40}": {"content": "<|im_end|>", "special": True}},
    ],
)
def test_a_broken_list_of_control_tokens_is_left_alone_as_when_the_data_was_tokenised(
    tmp_path: Path, broken: dict[str, Any]
) -> None:
    listed = {"0": {"content": "<|endoftext|>", "special": True}} | broken
    model = list_control_tokens(base_model(tmp_path / "base"), listed)
    assert ChatTokenizer.from_dir(model).eos_ids == (0, 2)
    assert exported(model, tmp_path / "out")["eos_token_id"] == [0, 2]


def test_exporting_again_adds_nothing(tmp_path: Path) -> None:
    first = exported(base_model(tmp_path / "base"), tmp_path / "out")
    assert exported(tmp_path / "out", tmp_path / "again") == first


def test_a_generation_config_that_knows_every_end_stays_as_it_is(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tuned")
    assert exported(model, tmp_path / "out") == json.loads((model / "generation_config.json").read_text())


def test_a_model_without_a_generation_config_gets_one(tmp_path: Path) -> None:
    model = base_model(tmp_path / "base", pad_token_id=3)
    (model / "generation_config.json").unlink()
    assert exported(model, tmp_path / "out") == {"bos_token_id": 0, "pad_token_id": 3, "eos_token_id": [0, 2]}


@pytest.mark.parametrize("ids", [[7, 0], 7])
def test_the_model_s_own_ends_come_first(tmp_path: Path, ids: list[int] | int) -> None:
    model = base_model(tmp_path / "base")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert exported(model, tmp_path / "out") == {"eos_token_id": [7, 0, 2]}


def test_an_end_that_the_model_has_no_row_for_is_left_out(tmp_path: Path) -> None:
    model = base_model(tmp_path / "base")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 100_000]}))
    assert exported(model, tmp_path / "out") == {"eos_token_id": [0, 2]}


def trained_adapter(model: Path, out: Path, name: str) -> Path:
    """The adapter of a short training of `model`, whose name in the plan is `name`."""
    data = write_rows(out / "train", random_rows(2))
    case = Case(make_plan_for("lora", model=name, n_epochs=1), model, data, out / "run")
    return case.run().checkpoints[-1].path / "adapter"


@pytest.mark.parametrize(
    ("model", "base", "revision"),
    [
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", None),
        ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", None),
        ("acme/base", "acme/base", None),
        (f"acme/base@{'0123456789' * 4}", "acme/base", "0123456789" * 4),
        ("/models/base", "/models/base", None),
        ("s3://bucket/base", "s3://bucket/base", None),
    ],
)
def test_an_adapter_names_its_base_as_others_load_it(
    tmp_path: Path, model: str, base: str, revision: str | None
) -> None:
    adapter = trained_adapter(make_tiny_model(tmp_path / "base"), tmp_path, model)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)


@pytest.mark.parametrize("template", ["own", "default"])
def test_an_adapter_comes_with_the_tokenizer_and_the_template_it_was_trained_with(
    tmp_path: Path, template: str
) -> None:
    model = make_tiny_model(tmp_path / "base")
    if template == "default":
        config = model / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": None}))
    adapter = trained_adapter(model, tmp_path, str(model))
    saved, trained_with = ChatTokenizer.from_dir(adapter), ChatTokenizer.from_dir(model)
    assert saved.has_own_template
    assert (adapter / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (saved.template, saved.eos_ids) == (trained_with.template, trained_with.eos_ids)

"""Reading a model's directory: its tokenizer, its chat template, the tokens that end generation."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from tests.trainers.data import templates
from tests.trainers.data.support import assistant, dialog, make_tokenizer, trained, user
from trainers.data.chat import ChatTokenizer
from trainers.errors import UserError


def test_without_a_chat_template_the_default_one_is_used_and_said_so(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, None, "pieces", "</s>")
    assert not tokenizer.has_own_template
    text = tokenizer.render([user("Hello"), assistant("Fine.")], add_generation_prompt=True)
    assert text == "<s><|user|>\nHello</s>\n<|assistant|>\nFine.</s>\n<|assistant|>\n"


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{% generation %}!{% endgeneration %}")
    assert make_tokenizer(tmp_path, templates.CHATML).render([user("Hello")]) == "Hello!"


def test_the_default_template_is_used_if_there_are_several(tmp_path: Path) -> None:
    entries = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    assert make_tokenizer(tmp_path, None, "pieces", "</s>", chat_template=entries).render([user("Hello")]) == "Hello"


def test_ids_that_end_generation_come_from_every_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    assert make_tokenizer(tmp_path, templates.CHATML).eos_ids == (0, 5, 2)


def test_padding_falls_back_to_eos(tmp_path: Path) -> None:
    assert make_tokenizer(tmp_path, templates.CHATML, pad_token=None).pad_id == 2
    assert make_tokenizer(tmp_path, templates.CHATML).pad_id == 0


def test_a_token_may_be_spelt_as_an_object(tmp_path: Path) -> None:
    assert make_tokenizer(tmp_path, templates.CHATML, pad_token={"content": "<s>", "lstrip": False}).pad_id == 3


def test_named_tokens_are_control_tokens_whatever_tokenizer_json_says(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, templates.CHATML)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|im_end|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert trained(ChatTokenizer.from_dir(tmp_path), dialog(user("a"), assistant("b"))) == ["b<|im_end|>"]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json can't be read"),
        ("tokenizer_config.json", "nope", "tokenizer_config.json can't be read as JSON"),
        ("tokenizer_config.json", "[" * 9999, "tokenizer_config.json can't be read as JSON"),
        ("tokenizer_config.json", "{}", "no end-of-sequence token"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [[2]]}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": 1e40}', "eos_token_id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"additional_special_tokens": 7}', "additional_special_tokens"),
        ("chat_template.jinja", "{% if %}", "not valid Jinja"),
        ("chat_template.jinja", "caf\xe9", "chat_template.jinja is not UTF-8"),
        ("chat_template.jinja", "{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "not valid Jinja"),
        ("chat_template.jinja", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "not valid Jinja"),
        ("chat_template.jinja", "{{ " + "9" * 5000 + " }}", "not valid Jinja"),
    ],
)
def test_what_is_missing_or_broken_is_named(tmp_path: Path, file: str, text: str | None, words: str) -> None:
    make_tokenizer(tmp_path, templates.CHATML)
    (tmp_path / file).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / file).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=words) as caught:
        ChatTokenizer.from_dir(tmp_path)
    assert caught.value.error.param == "model"


def test_a_tokenizer_that_makes_the_library_panic_is_the_models_fault(tmp_path: Path) -> None:
    """The panic of a Rust library is no Exception: nobody who catches those would see it."""
    make_tokenizer(tmp_path, templates.CHATML)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["model"]["continuing_subword_prefix"] = "#" * 100
    file.write_text(json.dumps(spec))
    with pytest.raises(UserError, match="can't be read"):
        ChatTokenizer.from_dir(tmp_path)


def words_only(directory: Path, words: list[str]) -> ChatTokenizer:
    vocabulary = {word: number for number, word in enumerate(["</s>", *words])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return ChatTokenizer.from_dir(directory)


def test_a_tokenizer_without_an_unknown_token_is_refused_at_once(tmp_path: Path) -> None:
    """It would fail at the first row that holds such a thing, with an error that nobody expects."""
    assert words_only(tmp_path, ["<unk>", "a"]).encode([dialog(user("?"), assistant("b"))])
    with pytest.raises(UserError, match="can't encode every text") as caught:
        words_only(tmp_path, ["a"])
    assert (caught.value.error.code, caught.value.error.param) == ("model_unsupported", "model")

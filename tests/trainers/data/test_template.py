"""Models with several chat templates: which one is used, and which are kept."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainers.data import templates
from tests.trainers.data.support import assistant, call, dialog, make_tokenizer, tool_result, trained, user
from trainers.data.chat import ChatTokenizer
from trainers.errors import UserError

TOOL = {"type": "function", "function": {"name": "f"}}
NAMED = {"default": templates.CHATML, "tool_use": templates.QWEN25}


def as_a_list(directory: Path, named: dict[str, str]) -> ChatTokenizer:
    return make_tokenizer(
        directory, None, chat_template=[{"name": name, "template": source} for name, source in named.items()]
    )


def as_an_object(directory: Path, named: dict[str, str]) -> ChatTokenizer:
    return make_tokenizer(directory, None, chat_template=named)


def as_files(directory: Path, named: dict[str, str]) -> ChatTokenizer:
    others = directory / "additional_chat_templates"
    others.mkdir(parents=True)
    for name, source in named.items():
        file = directory / "chat_template.jinja" if name == "default" else others / f"{name}.jinja"
        file.write_text(source)
    return make_tokenizer(directory, "{{ 'a file wins over the config' }}")


@pytest.mark.parametrize("make", [as_a_list, as_an_object, as_files])
class TestNamedTemplates:
    def test_dialogs_with_tools_are_rendered_by_the_one_for_tools(
        self, make: Callable[..., ChatTokenizer], tmp_path: Path
    ) -> None:
        tokenizer = make(tmp_path, NAMED)
        row = dialog(
            user("a"), assistant(None, tool_calls=[call("f", {})]), tool_result("1"), assistant("yes"), tools=[TOOL]
        )
        first, last = trained(tokenizer, row)
        assert (first[:11], last) == ("<tool_call>", "yes<|im_end|>")
        assert "You are Q." in tokenizer.locate(row).text
        assert "You are Q." not in tokenizer.locate(dialog(user("a"), assistant("yes"))).text

    def test_the_one_of_the_name_default_may_be_the_only_one(
        self, make: Callable[..., ChatTokenizer], tmp_path: Path
    ) -> None:
        tokenizer = make(tmp_path, {"default": templates.CHATML})
        assert tokenizer.has_own_template
        assert tokenizer.template == templates.CHATML

    def test_without_a_default_one_they_are_refused_by_their_names(
        self, make: Callable[..., ChatTokenizer], tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=r"by name \(chatml, rag\), and none of them is 'default'") as caught:
            make(tmp_path, {"rag": templates.CHATML, "chatml": templates.CHATML})
        assert (caught.value.error.code, caught.value.error.param) == ("model_unsupported", "model")

    def test_a_copy_of_the_tokenizer_knows_all_and_another_template_makes_another_fingerprint(
        self, make: Callable[..., ChatTokenizer], tmp_path: Path
    ) -> None:
        tokenizer, other = make(tmp_path / "a", NAMED), make(tmp_path / "b", NAMED | {"tool_use": templates.QWEN3})
        copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301  -- our own bytes
        row = dialog(user("a"), assistant("yes"), tools=[TOOL])
        assert copy.locate(row) == tokenizer.locate(row)
        assert copy.fingerprint == tokenizer.fingerprint != other.fingerprint

"""Answers with reasoning: templates drop it, print it in other ways, or put an empty thought before the words."""

from pathlib import Path

import pytest

from tests.trainers.data import templates
from tests.trainers.data.support import (
    assistant,
    call,
    dialog,
    make_tokenizer,
    plain_tokenizer,
    tool_result,
    trained,
    user,
)
from trainers.data.chat import ChatTokenizer

REASONED = "<think>\nlong\n</think>"


@pytest.mark.parametrize(
    "template",
    [templates.R1_DISTILL, templates.R1_DISTILL.replace("<|Assistant|>", "<|end_header_id|>").split("{% if add")[0]],
    ids=["with a prompt", "without one, but with control tokens"],
)
def test_a_header_that_ends_like_the_dropped_reasoning_is_not_trained(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(tmp_path, template, "pieces", "</s>")
    row = dialog(user("a"), assistant(f"{REASONED}yes"), user("b"), assistant(f"{REASONED}\n\nno"))
    assert trained(tokenizer, row) == ["yes</s>", "\n\nno</s>"]


def test_an_answer_whose_reasoning_is_dropped_counts_as_partly_shown(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, templates.R1_DISTILL, "pieces", "</s>")
    shown = [
        tokenizer.locate(
            dialog(user("a"), assistant(text), user("b"), assistant("no"), keep_loss=[False, keep, False, True])
        )
        for text, keep in (
            (f"{REASONED}yes", True),
            (f"{REASONED}<s>", True),
            (f"{REASONED}yes", False),
            (" yes\n", True),
        )
    ]
    assert [rendered.partly_shown for rendered in shown] == [True, True, False, False]


@pytest.mark.parametrize("template", [templates.THINKING, templates.QWEN3], ids=["thinking", "qwen3"])
class TestAnEmptyThought:
    def test_it_is_trained_where_the_model_has_to_write_it(self, tmp_path: Path, template: str) -> None:
        tokenizer = make_tokenizer(tmp_path, template)
        row = dialog(user("a"), assistant("yes"), user("b"), assistant("no"))
        assert trained(tokenizer, row) == ["yes<|im_end|>", f"{templates.EMPTY_THOUGHT}no<|im_end|>"]

    def test_it_is_not_trained_where_the_prompt_has_it(self, tmp_path: Path, template: str) -> None:
        prompted = template + f"{{% if add_generation_prompt %}}{{{{ '{templates.EMPTY_THOUGHT}' }}}}{{% endif %}}"
        row = dialog(user("a"), assistant("yes"))
        assert trained(make_tokenizer(tmp_path, prompted), row) == ["yes<|im_end|>"]

    def test_of_a_dialog_that_an_assistant_begins_it_is_trained_too(self, tmp_path: Path, template: str) -> None:
        row = dialog(assistant("Hello"), user("a"), assistant("yes"))
        runs = trained(make_tokenizer(tmp_path, template), row)
        assert runs == ["Hello<|im_end|>", f"{templates.EMPTY_THOUGHT}yes<|im_end|>"]


def test_an_empty_thought_before_a_call_is_trained(tmp_path: Path) -> None:
    row = dialog(user("a"), assistant(None, tool_calls=[call("f", {})]))
    (run,) = trained(make_tokenizer(tmp_path, templates.QWEN3), row)
    assert run.startswith(templates.EMPTY_THOUGHT + "<tool_call>")


def test_reasoning_before_a_call_at_the_end_of_the_dialog_is_trained(tmp_path: Path) -> None:
    row = dialog(user("a"), assistant("<think>\nhm\n</think>\n\nSo.", tool_calls=[call("f", {})]))
    (run,) = trained(make_tokenizer(tmp_path, templates.QWEN3), row)
    assert run.startswith("<think>\nhm\n</think>\n\nSo.\n<tool_call>")


def test_without_a_generation_prompt_no_header_is_trained(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + eos_token }}{% endfor %}"
    row = dialog(user("a"), assistant("yes"))
    assert trained(make_tokenizer(tmp_path, template), row) == ["yes<|im_end|>"]


def test_changed_blanks_do_not_make_reasoning_partly_shown(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, templates.QWEN3)
    assert not tokenizer.locate(dialog(user("a"), assistant("<think>hm</think>yes"))).partly_shown


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("long</think>yes", f"{REASONED}\n\nyes"),
        ("long\n</think>\n\nyes", f"{REASONED}\n\nyes"),
        ("\n  yes", f"{templates.EMPTY_THOUGHT}  yes"),
    ],
    ids=["reasoning without its beginning", "the same, as the template writes it", "blanks that the template drops"],
)
def test_what_the_template_adds_to_the_beginning_of_an_answer_is_trained(
    tmp_path: Path, content: str, shown: str
) -> None:
    tokenizer = make_tokenizer(tmp_path, templates.QWEN3)
    row = dialog(user("a"), assistant(content))
    assert trained(tokenizer, row) == [f"{shown}<|im_end|>"]
    assert not tokenizer.locate(row).unprompted


def test_what_is_trained_of_a_row_does_not_depend_on_the_rows_before_it(tmp_path: Path) -> None:
    plain = dialog(user("hi"), assistant("yes"))
    result = dialog(user("<tool_response>7</tool_response>"), assistant("Seven."))
    for first in (plain, result):
        tokenizer = make_tokenizer(tmp_path, templates.QWEN3)
        trained(tokenizer, first)
        assert trained(tokenizer, plain) == [f"{templates.EMPTY_THOUGHT}yes<|im_end|>"]
        assert trained(tokenizer, result) == ["Seven.<|im_end|>"]


def test_an_empty_thought_is_trained_where_the_answer_follows_another_answer(tmp_path: Path) -> None:
    row = dialog(user("a"), assistant("one"), assistant("two"))
    runs = trained(make_tokenizer(tmp_path, templates.QWEN3), row)
    assert runs == ["one<|im_end|>", f"{templates.EMPTY_THOUGHT}two<|im_end|>"]


class TestAPromptThatBeginsAThought:
    @pytest.mark.parametrize("template", [templates.R1_DISTILL, templates.QWQ], ids=["r1", "qwq"])
    def test_a_row_without_reasoning_is_known_not_to_be_what_the_model_is_asked_for(
        self, tmp_path: Path, template: str
    ) -> None:
        tokenizer = make_tokenizer(tmp_path, template, "pieces", "</s>")
        asked, answered = user("a"), assistant("yes")
        assert tokenizer.locate(dialog(asked, answered)).unprompted
        assert not tokenizer.locate(dialog(asked, answered, keep_loss=[True, False])).unprompted

    def test_an_answer_with_reasoning_is_what_the_model_is_asked_for(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(tmp_path, templates.QWQ)
        assert not tokenizer.locate(dialog(user("a"), assistant(f"{REASONED}\n\nyes"))).unprompted

    def test_an_empty_thought_that_the_template_ends_is_what_the_model_is_asked_for(self, tmp_path: Path) -> None:
        tokenizer, row = make_tokenizer(tmp_path, templates.ALWAYS_THINKING), dialog(user("a"), assistant("yes"))
        assert not tokenizer.locate(row).unprompted
        assert trained(tokenizer, row) == ["\n</think>\n\nyes<|im_end|>"]

    def test_reasoning_whose_beginning_the_prompt_has_is_shown_whole(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(tmp_path, templates.ALWAYS_THINKING)
        rendered = tokenizer.locate(dialog(user("a"), assistant("<think>hm</think>yes")))
        assert (rendered.partly_shown, rendered.unprompted) == (False, False)

    def test_earlier_answers_whose_reasoning_is_dropped_are_counted(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(tmp_path, templates.ALWAYS_THINKING)
        messages = [user("a"), assistant("yes"), user("b"), assistant(f"{REASONED}\n\nno")]
        assert tokenizer.locate(dialog(*messages)).unprompted
        assert not tokenizer.locate(dialog(*messages, keep_loss=[False, False, False, True])).unprompted


@pytest.mark.parametrize("template", [templates.CHATML, templates.LLAMA3, templates.GEMMA, templates.MISTRAL])
def test_if_the_prompt_is_just_a_header_every_answer_is_prompted(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(tmp_path, template)
    row = dialog(user("a"), assistant(" yes\n"), user("b"), assistant("no"), keep_loss=[True, True, False, True])
    assert not tokenizer.locate(row).unprompted


def test_an_answer_to_a_tools_result_needs_no_header_where_its_prompt_has_none(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ':' if m['role'] != 'assistant' or messages[loop.index0 - 1]['role'] != "
        "'tool' else '' }}{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}"
        "{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1]['role'] != 'tool' %}assistant:{% endif %}"
    )
    calling = assistant(None, tool_calls=[call("f", {})])
    row = dialog(user("a"), calling, tool_result("7"), assistant("Seven."), user("b"), assistant("no"))
    assert not make_tokenizer(tmp_path, template).locate(row).unprompted


class TestThoughtsThatAreControlTokens:
    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> ChatTokenizer:
        make_tokenizer(tmp_path, templates.QWEN3)
        plain = plain_tokenizer(tmp_path)
        plain.add_special_tokens(["<think>", "</think>"])
        plain.save(str(tmp_path / "tokenizer.json"))
        return ChatTokenizer.from_dir(tmp_path)

    @pytest.mark.parametrize("reasoning", [REASONED + "\n\n", "<think>long</think>"])
    def test_an_answers_reasoning_is_trained_as_the_template_writes_it(
        self, tokenizer: ChatTokenizer, reasoning: str
    ) -> None:
        row = dialog(user("a"), assistant(f"{reasoning}yes"))
        ((ids, _),) = tokenizer.encode([row])
        assert trained(tokenizer, row) == [f"{REASONED}\n\nyes<|im_end|>"]
        assert not tokenizer.locate(row).partly_shown
        assert tokenizer.texts(ids.tolist()).count("<think>") == 1

    def test_earlier_reasoning_is_dropped_as_ever(self, tokenizer: ChatTokenizer) -> None:
        row = dialog(user("a"), assistant(f"{REASONED}\n\nyes"), user("b"), assistant("no"))
        assert trained(tokenizer, row) == ["yes<|im_end|>", f"{templates.EMPTY_THOUGHT}no<|im_end|>"]

    def test_they_are_in_an_answers_text(self, tokenizer: ChatTokenizer) -> None:
        ((ids, mask),) = tokenizer.encode([dialog(user("a"), assistant(f"{REASONED}\n\nyes"))])
        assert tokenizer.decode(ids[mask].tolist()) == f"{REASONED}\n\nyes"

    def test_what_a_user_writes_of_thoughts_is_mere_text(self, tokenizer: ChatTokenizer) -> None:
        ((ids, _),) = tokenizer.encode([dialog(user("<think>"), assistant("yes"))])
        assert tokenizer.texts(ids.tolist()).count("<think>") == 1
        assert "<think>" not in tokenizer.texts(tokenizer.encode_prompt([user("<think>")]))

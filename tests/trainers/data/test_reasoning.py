"""Answers with reasoning: templates drop it, write it otherwise, or put an empty one before the words."""

from pathlib import Path

import pytest

from tests.trainers.data import templates
from tests.trainers.data.support import assistant, dialog, make_tokenizer, trained, user

REASONED = "<think>\nlong\n</think>"


@pytest.mark.parametrize(
    "template",
    [templates.R1_DISTILL, templates.R1_DISTILL.replace("<|Assistant|>", "<|end_header_id|>").split("{% if add")[0]],
    ids=["with a prompt", "without one, but with control tokens"],
)
def test_a_header_that_ends_as_the_dropped_reasoning_does_is_not_trained(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(tmp_path, template, "pieces", "</s>")
    row = dialog(user("a"), assistant(f"{REASONED}yes"), user("b"), assistant(f"{REASONED}\n\nno"))
    assert trained(tokenizer, row) == ["yes</s>", "\n\nno</s>"]


def test_of_an_answer_whose_reasoning_is_dropped_it_is_known_that_only_a_part_is_shown(tmp_path: Path) -> None:
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


def test_reasoning_whose_blanks_the_template_changes_is_shown_whole(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, templates.QWEN3)
    assert not tokenizer.locate(dialog(user("a"), assistant("<think>hm</think>yes"))).partly_shown

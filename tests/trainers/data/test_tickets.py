"""The demo's data set: the committed files are what the generator writes, and the held-out part is a fair test."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trainers.data.rows import parse_row

TICKETS = Path(__file__).parents[3] / "examples" / "tickets"
FILES = ("train.jsonl", "valid.jsonl", "heldout.jsonl")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TICKETS / name).read_text(encoding="utf-8").splitlines()]


def answers(name: str) -> list[str]:
    return [row["dialog"][-1]["content"] for row in rows(name)]


def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, TICKETS / "generate.py", "--out", tmp_path], check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (TICKETS / name).read_bytes(), name


@pytest.mark.parametrize("name", FILES)
def test_every_row_can_be_trained_on(name: str) -> None:
    for line in (TICKETS / name).read_bytes().splitlines():
        assert parse_row(line).keep_loss == (False, False, True)


@pytest.mark.parametrize("name", FILES)
def test_all_kinds_of_answers_are_about_equally_frequent(name: str) -> None:
    kinds = Counter(tuple(answer.split(" | ")[::2]) for answer in answers(name))
    assert len(kinds) == 15
    assert max(kinds.values()) - min(kinds.values()) <= 2


def test_no_answer_can_be_memorised() -> None:
    everything = [answer for name in FILES for answer in answers(name)]
    assert len(set(everything)) == len(everything)
    orders = {answer.split(" | ")[1] for answer in everything}
    assert len(orders) == len(everything)
    for name in FILES:
        for row in rows(name):
            _, message, answer = (turn["content"] for turn in row["dialog"])
            assert answer.split(" | ")[1].removeprefix("order ") in message

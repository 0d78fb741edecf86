"""A model's answer, computed without Ray and HTTP: the reference for tests that ask a model through them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.data.chat import ChatTokenizer
from trainers.models.chat_model import ChatModel
from trainers.models.generate import generate


def generated(directory: Path, messages: Sequence[Any], max_new_tokens: int) -> tuple[list[int], str]:
    """The greedy answer to a dialog: its tokens and its text."""
    tokenizer = ChatTokenizer.from_dir(directory)
    (ids,) = generate(
        ChatModel.load(directory)._decoder,
        [tokenizer.encode_prompt(messages)],
        max_new_tokens=max_new_tokens,
        eos_ids=set(tokenizer.eos_ids),
        pad_id=tokenizer.pad_id,
    )
    return ids, tokenizer.decode(ids)

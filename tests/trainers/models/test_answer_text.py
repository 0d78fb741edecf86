"""An answer's text, token by token: put together it is what decoding all its tokens at once gives."""

from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import FAMILIES, make_tiny_model
from tests.trainers.data.support import user, with_new_tokens
from trainers.answers import Question
from trainers.data.chat import ChatTokenizer
from trainers.errors import UserError
from trainers.models.answer_text import AnswerText, encode_question


def tokenizer_of(path: Path, family: str) -> ChatTokenizer:
    return ChatTokenizer.from_dir(make_tiny_model(path, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_of_any_tokens_make_up_their_text(family: str, tmp_path: Path) -> None:
    """Any: control tokens, halves of characters and lone blanks among them."""
    tokenizer = tokenizer_of(tmp_path, family)
    others = [token for token in range(512) if token not in tokenizer.eos_ids]
    draw = np.random.default_rng(11)
    for _ in range(40):
        tokens = draw.choice(others, size=draw.integers(1, 61)).tolist()
        text = AnswerText(tokenizer, (), len(tokens))
        pieces = [text.add(token) for token in tokens]
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(tokens)
        assert [piece.tokens for piece in pieces] == list(range(1, len(tokens) + 1))
        assert [piece.end for piece in pieces] == [None] * (len(tokens) - 1) + ["length"]


def test_a_character_of_several_tokens_comes_whole(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "llama")
    tokens = tokenizer.encode_prompt([{"role": "user", "content": "a 🦊 and ü"}])
    text = AnswerText(tokenizer, (), len(tokens) + 1)
    pieces = [text.add(token).text for token in tokens]
    assert "🦊" in pieces
    assert "ü" in pieces
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("stop", ["\n🦊", "ü\n🦊", "c ü"])
def test_a_stop_text_is_found_though_a_character_within_it_takes_several_tokens(tmp_path: Path, stop: str) -> None:
    tokenizer = tokenizer_of(tmp_path, "llama")
    tokens = tokenizer.encode_prompt([{"role": "user", "content": "a c ü\n🦊 b"}])
    text = AnswerText(tokenizer, (stop,), len(tokens) + 1)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if pieces[-1].end:
            break
    whole = tokenizer.decode(tokens)
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].end == "stop"


def test_a_token_costs_the_same_however_long_the_answer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(tmp_path, "llama")
    tokens = tokenizer.encode_prompt([{"role": "user", "content": "the quick brown fox " * 50}])
    text = AnswerText(tokenizer, ("never",), len(tokens) + 1)
    decoded: list[int] = []
    original = ChatTokenizer.decode

    def watched(self: ChatTokenizer, ids: list[int]) -> str:
        decoded.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(ChatTokenizer, "decode", watched)
    for token in tokens:
        text.add(token)
    assert max(decoded) < 20 < len(tokens)


def test_a_question_with_a_token_that_the_embedding_has_no_row_for_is_refused(tmp_path: Path) -> None:
    tokenizer = with_new_tokens(tmp_path)
    with pytest.raises(UserError) as caught:
        encode_question(Question("mine", (user("a <late> b"),)), tokenizer, 64)
    assert (caught.value.error.code, caught.value.error.param) == ("invalid_messages", "messages")
    assert "is beyond the model's embedding" in caught.value.error.message
    assert encode_question(Question("mine", (user("a b"),)), tokenizer, 64)

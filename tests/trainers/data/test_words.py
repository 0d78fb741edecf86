"""Tokenising word by word gives the same tokens and mask as tokenising the whole text."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from tests.trainers.data.support import CONTROL, tokenizer_json
from trainers.data import words as words_module
from trainers.data.chat import _mask_one
from trainers.data.spans import Span
from trainers.data.words import _CUTTING_PATTERNS, WordTokenizer, cuts_between_words

LLAMA_3, QWEN_2 = sorted(_CUTTING_PATTERNS, key=lambda pattern: "1,3" not in pattern)
BYTES = {"add_prefix_space": False, "use_regex": False}


def make(pre_tokenizer: Any = None, normalizer: Any = None, added: Sequence[AddedToken] = ()) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json("bytes"))
    tokenizer.post_processor = None
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(added))
    return tokenizer


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(**BYTES),
        ]
    )


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTTING = {
    "gpt2": make(GPT_2),
    "smollm2": make(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2])),
    "llama3": make(split(LLAMA_3)),
    "qwen2": make(split(QWEN_2), normalizers.NFC()),
    "blanks": make(split(LLAMA_3), added=[AddedToken("  "), AddedToken("\t\t"), AddedToken(" the", lstrip=True)]),
}
WHOLE = {
    "a blank in front": make(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "pieces": Tokenizer.from_str(tokenizer_json("pieces")),
    "no pattern": make(pre_tokenizers.ByteLevel(**BYTES)),
    "an unknown pattern": make(split(r"\p{L}+ \p{L}+")),
    "lower case": make(GPT_2, normalizers.Lowercase()),
    "a token of two words": make(GPT_2, added=[AddedToken("new york")]),
    "a token that swallows blanks": make(GPT_2, added=[AddedToken("<mask>", rstrip=True)]),
    "a token that must stand alone": make(GPT_2, added=[AddedToken(" the", single_word=True)]),
}

BITS = (
    *("a", "b", " the", " weather", "Don't", "'s", "'S", " ", "  ", "\t\t", "\n", "\r\n", "\u00a0", "\u2009", "\x1c"),
    *(
        ".",
        ",",
        "...",
        "!?",
        "1",
        "1234",
        " 5",
        "é",
        "e\u0301",
        "\u0301",
        "ß",
        "Å",
        "日本",
        "👩‍👩‍👧",
        "\u200b",
        *CONTROL[:4],
    ),
)


@pytest.mark.parametrize("kind", CUTTING)
@given(data=st.data())
def test_tokens_and_masks_are_those_of_the_whole_text(kind: str, data: st.DataObject) -> None:
    tokenizer = CUTTING[kind]
    texts = data.draw(st.lists(st.lists(st.sampled_from(BITS), max_size=30).map("".join), min_size=1, max_size=4))
    spans = [data.draw(spans_in(text)) for text in texts]
    encoded = WordTokenizer(tokenizer).encode(texts, spans)
    whole = tokenizer.encode_batch(texts, add_special_tokens=False)
    for (ids, mask), encoding, trained in zip(encoded, whole, spans, strict=True):
        expected_ids, expected_mask = _mask_one(encoding, trained)
        assert ids.tolist() == expected_ids.tolist()
        assert mask.tolist() == expected_mask.tolist()


def spans_in(text: str) -> st.SearchStrategy[list[Span]]:
    if not text:
        return st.just([])
    ends = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    return st.lists(ends.filter(lambda pair: pair[0] < pair[1]).map(lambda pair: (pair[0], pair[1])), max_size=3)


@pytest.mark.parametrize("kind", CUTTING)
def test_tokenizers_that_cut_between_words_are_known(kind: str) -> None:
    assert cuts_between_words(CUTTING[kind])


@pytest.mark.parametrize("kind", WHOLE)
def test_other_tokenizers_are_left_alone(kind: str) -> None:
    assert not cuts_between_words(WHOLE[kind])


def test_a_tokenizer_with_dropout_is_not_cached() -> None:
    spec = json.loads(tokenizer_json("bytes"))
    spec["model"]["dropout"] = 0.5
    assert not cuts_between_words(Tokenizer.from_str(json.dumps(spec)))


def test_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "_MAX_WORDS", 10)
    words = WordTokenizer(CUTTING["gpt2"])
    for number in range(100):
        words.encode([f"{chr(97 + number % 26) * (1 + number // 26)} a {'long' * 20}"], [[]])
        assert words._ids.keys() == words._offsets.keys()
        assert len(words._ids) <= 10
        assert all(len(word) <= 64 for word in words._ids)


def test_a_text_too_long_for_a_batch_is_tokenised() -> None:
    text = "x" * 70_000 + " the weather"
    ((ids, mask),) = WordTokenizer(CUTTING["gpt2"]).encode([text], [[(70_000, len(text))]])
    expected = CUTTING["gpt2"].encode(text, add_special_tokens=False)
    assert ids.tolist() == expected.ids
    assert np.flatnonzero(mask).tolist() == [i for i, (_, end) in enumerate(expected.offsets) if end > 70_000]

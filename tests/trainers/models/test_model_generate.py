"""Generation: batching, padding and the cache change nothing about the answers."""

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torchtune.modules import TransformerDecoder

from tests.tiny_models import FAMILIES, make_tiny_model
from tests.trainers.models.conftest import BuildModel
from trainers.answers import Sampling
from trainers.errors import UserError
from trainers.models import generate as generation
from trainers.models.generate import Continuation, advance, generate

PROMPTS = [[5, 6, 7], [300], [17, 400, 23, 9, 211, 34, 76, 12, 500], [44, 45, 46, 47], [8, 9]]


def by_hand(model: TransformerDecoder, prompt: list[int], max_new_tokens: int, eos_ids: set[int]) -> list[int]:
    """Without cache, batch or padding: the whole sequence again for every token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            token = int(model(torch.tensor([tokens]))[0, -1].argmax())
            if token in eos_ids:
                break
            tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_each_prompt_does_alone(family: str, tmp_path: Path, build_model: BuildModel) -> None:
    model = build_model(make_tiny_model(tmp_path, family))
    answers = generate(model, PROMPTS, max_new_tokens=12, eos_ids=set(), pad_id=0)
    assert answers == [by_hand(model, prompt, 12, set()) for prompt in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_made_together_are_those_made_alone(family: str, tmp_path: Path, build_model: BuildModel) -> None:
    """Each begins while others are under way, and goes on over several growths of the cache, and windows."""
    model = build_model(make_tiny_model(tmp_path, family))
    under_way: list[Continuation] = []
    answers: list[list[int | UserError]] = [[] for _ in PROMPTS]
    for step in range(40 + len(PROMPTS)):
        if step < len(PROMPTS):
            under_way.append(Continuation(model, PROMPTS[step], max_new_tokens=40, sampling=Sampling(temperature=0)))
        turn = [number for number in range(len(under_way)) if len(answers[number]) < 40]
        if turn:
            for number, token in zip(turn, advance(model, [under_way[number] for number in turn]), strict=True):
                answers[number].append(token)
    assert answers == [generate(model, [p], max_new_tokens=40, eos_ids=set(), pad_id=0)[0] for p in PROMPTS]


@pytest.mark.parametrize("failing", [1, 2, 3, 6])
def test_an_answer_goes_on_after_its_cache_could_not_grow(
    tmp_path: Path, build_model: BuildModel, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    model = build_model(make_tiny_model(tmp_path))
    answer = Continuation(model, [5, 6, 7], max_new_tokens=6, sampling=Sampling(temperature=0))
    tokens = advance(model, [answer])
    calls = itertools.count(1)
    original = torch.Tensor.new_empty

    def short(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        if next(calls) == failing:
            raise torch.OutOfMemoryError
        return original(tensor, *shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", short)
    while len(tokens) < 6:
        with suppress(torch.OutOfMemoryError):
            tokens += advance(model, [answer])
    assert next(calls) > failing + 1
    assert tokens == by_hand(model, [5, 6, 7], 6, set())


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.3, 0.0, 0.2])
    draws = 4000

    def shares(sampling: Sampling) -> torch.Tensor:
        random = torch.Generator().manual_seed(5)
        drawn = [generation._chosen(probabilities.log(), sampling, random) for _ in range(draws)]
        return torch.bincount(torch.tensor(drawn), minlength=5) / draws

    assert shares(Sampling()).allclose(probabilities, atol=0.03)
    sharper = probabilities.square() / probabilities.square().sum()
    assert shares(Sampling(temperature=0.5)).allclose(sharper, atol=0.03)
    nucleus = torch.tensor([0.0, 4 / 7, 3 / 7, 0.0, 0.0])  # 0.4 is less than the half asked for, 0.4 + 0.3 is enough
    assert shares(Sampling(top_p=0.5)).allclose(nucleus, atol=0.03)
    likeliest = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    for sampling in (
        Sampling(top_p=0),
        Sampling(temperature=1e-30),
        Sampling(temperature=5e-324),
        Sampling(temperature=0),
    ):
        assert shares(sampling).equal(likeliest)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_no_token_can_be_chosen_from_are_the_model_s_fault(temperature: float, broken: float) -> None:
    logits = torch.tensor([1.0, broken, 2.0])
    with pytest.raises(UserError, match="weights are broken") as caught:
        generation._chosen(logits, Sampling(temperature=temperature), torch.Generator())
    assert caught.value.error.code == "model_broken"


def test_after_an_error_for_one_answer_all_of_them_can_be_advanced_again(
    tmp_path: Path, build_model: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the chat engine does when memory is short: each by itself."""
    model = build_model(make_tiny_model(tmp_path))
    answers = [Continuation(model, p, max_new_tokens=6, sampling=Sampling(temperature=0)) for p in PROMPTS[:3]]
    calls = itertools.count(1)
    original = generation._chosen

    def short(*arguments: Any) -> int:
        if next(calls) == 2:
            raise torch.OutOfMemoryError
        return original(*arguments)

    monkeypatch.setattr(generation, "_chosen", short)
    with pytest.raises(torch.OutOfMemoryError):
        advance(model, answers)
    tokens = [[token for _ in range(6) for token in advance(model, [answer])] for answer in answers]
    assert tokens == [by_hand(model, prompt, 6, set()) for prompt in PROMPTS[:3]]


def test_windows_move_along_with_the_answer(tmp_path: Path, build_model: BuildModel) -> None:
    model = build_model(make_tiny_model(tmp_path, "gemma3_text", sliding_window=4, seed=3))
    answers = generate(model, PROMPTS, max_new_tokens=24, eos_ids=set(), pad_id=0)
    assert answers == [by_hand(model, prompt, 24, set()) for prompt in PROMPTS]


def test_an_answer_ends_before_its_end_token(tmp_path: Path, build_model: BuildModel) -> None:
    model = build_model(make_tiny_model(tmp_path, "mistral"))
    free = generate(model, PROMPTS, max_new_tokens=8, eos_ids=set(), pad_id=0)
    eos_ids = {free[0][3], free[2][0]}
    answers = generate(model, PROMPTS, max_new_tokens=8, eos_ids=eos_ids, pad_id=0)
    assert answers == [by_hand(model, prompt, 8, eos_ids) for prompt in PROMPTS]
    assert len(answers[0]) <= 3
    assert answers[2] == []


def test_answers_come_in_the_order_of_the_prompts_over_several_batches(
    tmp_path: Path, build_model: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(make_tiny_model(tmp_path))
    whole = generate(model, PROMPTS, max_new_tokens=4, eos_ids=set(), pad_id=0)
    monkeypatch.setattr(generation, "MAX_BATCH", 2)
    assert generate(model, PROMPTS, max_new_tokens=4, eos_ids=set(), pad_id=0) == whole


def test_generating_leaves_the_model_ready_to_train(tmp_path: Path, build_model: BuildModel) -> None:
    model = build_model(make_tiny_model(tmp_path)).train()
    generate(model, PROMPTS, max_new_tokens=2, eos_ids=set(), pad_id=0)
    assert model.training
    model(torch.tensor(PROMPTS[2:3])).sum().backward()
    assert model.tok_embeddings.weight.grad is not None


def test_no_prompts_give_no_answers(tmp_path: Path, build_model: BuildModel) -> None:
    model = build_model(make_tiny_model(tmp_path))
    assert generate(model, [], max_new_tokens=4, eos_ids=set(), pad_id=0) == []


@pytest.mark.parametrize(("prompts", "named"), [([[1], []], "empty"), ([[1] * 510], "514")])
def test_a_prompt_that_cannot_be_answered_is_refused(
    prompts: list[list[int]], named: str, tmp_path: Path, build_model: BuildModel
) -> None:
    model = build_model(make_tiny_model(tmp_path))
    with pytest.raises(ValueError, match=named):
        generate(model, prompts, max_new_tokens=4, eos_ids=set(), pad_id=0)

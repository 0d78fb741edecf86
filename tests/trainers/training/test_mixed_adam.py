"""MixedAdam against torch's Adam on fp32 copies, to and from which whole gradients and results are copied."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from trainers.training import mixed_adam
from trainers.training.mixed_adam import MixedAdam, MixedAdamW

SHAPES = [(3, 40), (7,), (1,), (64, 2), (130,), (0, 4)]
PIECE = 64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_adam, "PIECE", {"cpu": PIECE})


def copies_of_weights() -> dict[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    copies = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return {copy: nn.Parameter(copy.detach().to(torch.bfloat16)) for copy in copies}


def gradients(steps: int) -> Iterator[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in SHAPES]


@pytest.mark.parametrize(
    ("ours", "torchs"), [(MixedAdam, torch.optim.Adam), (MixedAdamW, torch.optim.AdamW)], ids=["Adam", "AdamW"]
)
@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True, "eps": 1e-3}])
def test_a_piece_at_a_time_the_numbers_and_the_state_are_torchs(
    ours: type[MixedAdam], torchs: type[torch.optim.Adam], kwargs: dict[str, Any]
) -> None:
    copied = copies_of_weights()
    expected = [nn.Parameter(copy.detach().clone()) for copy in copied]
    mine, theirs = ours(copied, {"lr": 0.1, **kwargs}), torchs(expected, lr=0.1, **kwargs)
    for of_step in gradients(3):
        for (copy, weight), one, gradient in zip(copied.items(), expected, of_step, strict=True):
            weight.grad, one.grad = gradient, gradient.float()
            assert copy.grad is None
        mine.step()
        theirs.step()
    for (copy, weight), one in zip(copied.items(), expected, strict=True):
        torch.testing.assert_close(copy, one)
        assert torch.equal(weight, copy.to(torch.bfloat16))
        assert weight.grad is None
        assert mine.state[copy].keys() == theirs.state[one].keys()
        for name, value in theirs.state[one].items():
            torch.testing.assert_close(mine.state[copy][name], value)


def test_what_has_no_gradient_stays_as_it_is() -> None:
    copied = copies_of_weights()
    (first, weight), *rest = copied.items()
    before = [(copy.detach().clone(), weight.detach().clone()) for copy, weight in rest]
    optimizer = MixedAdamW(copied, {"lr": 0.1, "weight_decay": 0.5})
    optimizer.step()
    assert not optimizer.state
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert list(optimizer.state) == [first]
    for (copy, weight), (of_copy, of_weight) in zip(rest, before, strict=True):
        assert torch.equal(copy, of_copy)
        assert torch.equal(weight, of_weight)


def test_gradients_are_never_in_fp32_more_than_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def update(copies: list[torch.Tensor], in_fp32: list[torch.Tensor], *_: object, **__: object) -> None:
        calls.append([len(gradient) for gradient in in_fp32])
        assert [len(copy) for copy in copies] == calls[-1]

    monkeypatch.setattr(torch, "_fused_adamw_", update)
    copied = copies_of_weights()
    for weight, gradient in zip(copied.values(), next(gradients(1)), strict=True):
        weight.grad = gradient
    MixedAdamW(copied, {}).step()
    assert calls == [[64], [56, 7, 1], [64], [64], [64], [64], [2, 0]]

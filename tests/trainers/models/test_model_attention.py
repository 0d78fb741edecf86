"""Attention by itself: every way to compute it agrees with the definition, written out."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from trainers.models.attention import BLOCK, Causal, Rules, block_mask, flex_attend

CPU = torch.device("cpu")
RULES = [Rules(window, 0.3, softcap, 0.0) for window, softcap in product((None, 5, 64, 300, 10_000), (None, 1.5))]
PLAIN = Rules(None, 0.25, None, 0.0)


def numbers(*rows: list[int], width: int) -> Tensor:
    """Documents of the given lengths in each row, then padding: [b, width]."""
    documents = torch.full((len(rows), width), -1)
    for line, lengths in enumerate(rows):
        filled = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        documents[line, : len(filled)] = filled
    return documents


def random_qkv(b: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """Six heads on two of keys and values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, s, heads, 16, generator=generator) for heads in (6, 2, 2))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def seen_by_definition(documents: Tensor, window: int | None) -> Tensor:
    """Bool [b, s, s], position by position."""
    at = torch.arange(documents.shape[1])
    distance = at[:, None] - at
    same = documents[:, :, None] == documents[:, None, :]
    return same & (distance >= 0) & (distance < (window or len(at)))


def by_definition(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, rules: Rules) -> Tensor:
    k, v = k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * rules.scale
    if rules.softcap:
        scores = rules.softcap * (scores / rules.softcap).tanh()
    weights = scores.masked_fill(~seen_by_definition(documents, rules.window)[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


PACKS = numbers([130, 1, 170, 40], [64, 200], [341], width=341)


@pytest.mark.parametrize("rules", RULES)
def test_documents_of_a_pack_are_attended_to_as_the_definition_says(rules: Rules) -> None:
    qkv = random_qkv(3, 341)
    outputs = Causal(341, {rules}, CPU, PACKS)(*qkv, rules)
    real = PACKS >= 0
    expected = by_definition(*qkv, PACKS, rules)
    torch.testing.assert_close(outputs[real], expected[real])
    gradients = [torch.autograd.grad(out[real].square().sum(), qkv) for out in (outputs, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rules", RULES)
def test_rows_that_are_not_packed_are_one_document_each(rules: Rules) -> None:
    qkv = random_qkv(2, 341)
    outputs = Causal(341, {rules}, CPU)(*qkv, rules)
    torch.testing.assert_close(outputs, by_definition(*qkv, torch.zeros(2, 341), rules))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rules", RULES)
def test_flex_attention_computes_the_same(rules: Rules, packed: bool) -> None:
    """Uncompiled, which runs anywhere: it weighs each pair as compiled, but looks at no block."""
    qkv = [x.detach() for x in random_qkv(3, 341)]  # there is no backward on the CPU
    documents = PACKS if packed else None
    outputs = flex_attend(*qkv, block_mask(341, rules.window, CPU, documents), rules, flex=flex_attention)
    real = PACKS >= 0
    torch.testing.assert_close(outputs[real], by_definition(*qkv, PACKS * packed, rules)[real])


@pytest.mark.parametrize("window", [None, 1, 100, BLOCK, BLOCK + 1, 300, 3 * BLOCK])
@pytest.mark.parametrize("lengths", [None, [700], [BLOCK, 2 * BLOCK, 100], [1] * 50 + [300, 5, 200], [255, 2, 300]])
def test_flex_attention_visits_every_block_in_which_something_is_seen(
    lengths: list[int] | None, window: int | None
) -> None:
    width = 700
    documents = None if lengths is None else numbers(lengths, [width], width=width)
    mask = block_mask(width, window, CPU, documents)
    seen = seen_by_definition(torch.zeros(1, width) if documents is None else documents, window)
    beyond = -width % BLOCK
    blocks = torch.nn.functional.pad(seen, (0, beyond, 0, beyond)).unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    some, whole = blocks.any(4).any(2), blocks.all(4).all(2)
    partial = mask.to_dense()[:, 0].bool()  # those looked at pair by pair
    entire = torch.zeros_like(partial)
    for b, row in product(range(len(partial)), range(partial.shape[1])):
        entire[b, row, mask.full_kv_indices[b, 0, row, : mask.full_kv_num_blocks[b, 0, row]].long()] = True
    partial &= ~entire
    assert not (some & ~partial & ~entire).any()
    assert not (entire & ~whole).any()
    assert not (whole & ~entire).any()


def test_padding_gives_finite_outputs_and_gradients() -> None:
    qkv = random_qkv(1, 64)
    rules = Rules(4, 0.25, 2.0, 0.0)
    outputs = Causal(64, {rules}, CPU, numbers([10], width=64))(*qkv, rules)
    assert outputs.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(outputs[:, :10].sum(), qkv))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_drops_weights_and_keeps_their_mean(softcap: float | None) -> None:
    q, k, v = (x.detach() for x in random_qkv(1, 8))
    v = torch.ones_like(v)
    rules = Rules(None, 0.25, softcap, 0.5)
    torch.manual_seed(0)
    causal = Causal(8, {rules}, CPU)
    outputs = torch.stack([causal(q, k, v, rules) for _ in range(2000)])
    assert set(outputs[:, 0, 0, 0, 0].tolist()) == {0.0, 2.0}
    assert (outputs.mean(0) - 1).abs().max() < 0.1


def test_compiled_code_serves_packs_of_any_documents() -> None:
    counter = CompileCounter()
    qkv = random_qkv(1, 64)

    @torch.compile(backend=counter)
    def layer(q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return mask(q * 2, k, v, PLAIN) + 1

    for lengths in ([10, 20], [5, 5, 30], [64], [1, 2, 3, 4]):
        documents = numbers(lengths, width=64)
        outputs = layer(*qkv, mask=Causal(64, {PLAIN}, CPU, documents))
        expected = by_definition(qkv[0] * 2, *qkv[1:], documents, PLAIN) + 1
        real = documents >= 0
        torch.testing.assert_close(outputs[real], expected[real])
        first = counter.frame_count if lengths == [10, 20] else first
    assert counter.frame_count == first

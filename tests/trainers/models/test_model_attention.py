"""Attention by itself: every way to compute it agrees with the definition, written out."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from trainers.models import attention
from trainers.models.attention import BLOCK, Causal, Rules, _flex_works, block_mask, can_compile_c, flex_attend
from trainers.models.rope import RotaryEmbedding, Rotation
from trainers.models.rope_config import RopeParams
from trainers.training.collate import Layout, Segment

CPU = torch.device("cpu")
RULES = [Rules(window, 0.3, softcap, 0.0) for window, softcap in product((None, 5, 64, 300, 10_000), (None, 1.5))]
PLAIN = Rules(None, 0.25, None, 0.0)
HEAD_DIM = 16
ROPE = RotaryEmbedding(RopeParams(theta=100.0), head_dim=HEAD_DIM, max_seq_len=700)


Tree = int | tuple[int, list["Tree"]]
"""Tokens of a segment, and what goes on after it, if anything does."""


def line(*trees: Tree, width: int) -> Layout:
    """The segments of `trees` one behind the other, then padding."""
    segments: list[Segment] = []
    positions, until = torch.zeros(1, width, dtype=torch.int64), torch.arange(1, width + 1)[None]

    def grow(tree: Tree, before: tuple[tuple[int, int], ...]) -> int:
        length, children = (tree, []) if isinstance(tree, int) else tree
        start = segments[-1].end if segments else 0
        end = start + length
        segments.append(Segment(start, end, before))
        depth = sum(b - a for a, b in before)
        positions[0, start:end] = torch.arange(depth, depth + length)
        last = end
        for child in children:
            last = grow(child, (*before, (start, end)))
        until[0, start:end] = last
        return last

    for tree in trees:
        grow(tree, ())
    return Layout(tuple(segments), positions, until)


def random_qkv(b: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """Six heads on two of keys and values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, s, heads, HEAD_DIM, generator=generator) for heads in (6, 2, 2))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def seen_by_definition(layout: Layout | None, width: int, window: int | None) -> Tensor:
    """Bool [s, s], segment by segment. Padding sees itself."""
    seen = torch.eye(width, dtype=torch.bool)
    for start, end, before in [Segment(0, width)] if layout is None else layout.segments:
        seen[start:end, start:end] = torch.ones(end - start, end - start).tril()
        for first, last in before:
            seen[start:end, first:last] = True
    at = torch.arange(width) if layout is None else layout.positions[0]
    return seen & (at[:, None] - at < (window or width))


def rotation_of(layout: Layout | None, width: int) -> Rotation:
    return ROPE.at(width, None if layout is None else layout.positions)


def still(width: int) -> Rotation:
    """Of every position by nothing."""
    return Rotation(torch.ones(width, 1, 8), torch.zeros(width, 1, 8))


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, rules: Rules, rotation: Rotation | None = None
) -> Tensor:
    rotation = rotation or still(q.shape[1])
    angles = torch.polar(torch.ones_like(rotation.cos), torch.atan2(rotation.sin, rotation.cos))
    q, k = (torch.complex(x[..., :8], x[..., 8:]) * angles for x in (q, k))
    q, k = (torch.cat([x.real, x.imag], -1) for x in (q, k))
    k, v = k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * rules.scale
    if rules.softcap:
        scores = rules.softcap * (scores / rules.softcap).tanh()
    seen = seen_by_definition(layout, q.shape[1], rules.window)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


LINES = [
    line(130, 1, 170, 40, width=341),
    line((100, [50, (20, [30, 41]), 60]), 9, width=341),
    line((3, [(290, [1, 2]), 20]), width=341),
    line(341, width=341),
    line((13, [40, 44, 7, 30, 31, 45]), (5, [(4, [3, 9]), 7]), 60, 20, 1, width=341),
]


def real(layout: Layout) -> Tensor:
    """Bool [1, s]: what is no padding."""
    return torch.arange(layout.until.shape[1])[None] < layout.segments[-1].end


@pytest.mark.parametrize("layout", LINES)
@pytest.mark.parametrize("rules", RULES)
def test_documents_of_a_line_are_attended_to_as_the_definition_says(rules: Rules, layout: Layout) -> None:
    qkv = random_qkv(1, 341)
    rotation = rotation_of(layout, 341)
    outputs = Causal(341, {rules}, CPU, layout, head_dim=HEAD_DIM, dtype=torch.float32)(*qkv, rotation, rules)
    expected = by_definition(*qkv, layout, rules, rotation)
    torch.testing.assert_close(outputs[real(layout)], expected[real(layout)])
    gradients = [torch.autograd.grad(out[real(layout)].square().sum(), qkv) for out in (outputs, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rules", RULES)
def test_lines_without_a_layout_are_one_document_each(rules: Rules) -> None:
    qkv = random_qkv(2, 341)
    rotation = rotation_of(None, 341)
    outputs = Causal(341, {rules}, CPU, head_dim=HEAD_DIM, dtype=torch.float32)(*qkv, rotation, rules)
    torch.testing.assert_close(outputs, by_definition(*qkv, None, rules, rotation))


@pytest.mark.parametrize("layout", [None, *LINES])
@pytest.mark.parametrize("rules", RULES)
def test_flex_attention_computes_the_same(rules: Rules, layout: Layout | None) -> None:
    """Uncompiled, which runs anywhere: it weighs each pair as compiled, but looks at no block."""
    q, k, v = (x.detach() for x in random_qkv(1, 341))  # there is no backward on the CPU
    outputs = flex_attend(q, k, v, block_mask(341, rules.window, CPU, layout), rules, flex=flex_attention)
    of = slice(None) if layout is None else real(layout)
    torch.testing.assert_close(outputs[of], by_definition(q, k, v, layout, rules)[of])
    assert outputs.isfinite().all()


@pytest.mark.parametrize("window", [None, 1, 100, BLOCK, BLOCK + 1, 300, 3 * BLOCK])
@pytest.mark.parametrize(
    "trees",
    [
        None,
        [700],
        [BLOCK, 2 * BLOCK, 100],
        [*[1] * 50, 300, 5, 200],
        [255, 2, 300],
        [(200, [*[20] * 5, 130, 140]), 60],
        [(10, [(150, [(100, [50, 60]), 200]), 30]), 40],
    ],
)
def test_flex_attention_visits_every_block_in_which_something_is_seen(
    trees: list[Tree] | None, window: int | None
) -> None:
    width = 700
    layout = None if trees is None else line(*trees, width=width)
    mask = block_mask(width, window, CPU, layout)
    seen = seen_by_definition(layout, width, window)
    beyond, count = -width % BLOCK, -(-width // BLOCK)
    blocks = torch.nn.functional.pad(seen, (0, beyond, 0, beyond)).reshape(count, BLOCK, count, BLOCK)
    some, whole = blocks.any(3).any(1), blocks.all(3).all(1)
    listed = mask.to_dense()[0, 0].bool()  # with those that are looked at pair by pair
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    entire = torch.zeros_like(listed)
    for row in range(len(listed)):
        entire[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
    listed |= entire
    assert not (some & ~listed).any()
    assert torch.equal(entire, whole)
    if trees is None or all(isinstance(tree, int) for tree in trees):
        assert torch.equal(listed, some)  # none too many
    else:
        assert listed.sum() < (len(listed) ** 2 + len(listed)) / 2 + (window is None)


@pytest.mark.parametrize(("layout", "exact"), [(line(130, 1, 170, 40, width=341), True), (LINES[2], False)])
def test_short_segments_in_bf16_are_attended_to_in_float32(layout: Layout, exact: bool) -> None:
    q, k, v = (x.detach().bfloat16() for x in random_qkv(1, 341))
    seen = Causal(341, {PLAIN}, CPU, layout, head_dim=HEAD_DIM, dtype=torch.float32)
    output = seen(q, k, v, still(q.shape[1]), PLAIN)
    expected = seen(q.float(), k.float(), v.float(), still(q.shape[1]), PLAIN).bfloat16()
    assert torch.equal(output, expected) is exact
    torch.testing.assert_close(output, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padding_gives_finite_outputs_and_takes_no_part_in_gradients(softcap: float | None) -> None:
    qkv = random_qkv(1, 64)
    rules = Rules(4, 0.25, softcap, 0.0)
    outputs = Causal(64, {rules}, CPU, line(10, width=64), head_dim=HEAD_DIM, dtype=torch.float32)(
        *qkv, still(64), rules
    )
    assert outputs.isfinite().all()
    for gradient in torch.autograd.grad(outputs[:, :10].sum(), qkv):
        assert gradient.isfinite().all()
        assert gradient[:, :10].abs().sum() > 0
        assert (gradient[:, 10:] == 0).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_drops_weights_and_keeps_their_mean(softcap: float | None) -> None:
    q, k, v = (x.detach() for x in random_qkv(1, 8))
    v = torch.ones_like(v)
    rules = Rules(None, 0.25, softcap, 0.5)
    torch.manual_seed(0)
    causal = Causal(8, {rules}, CPU, head_dim=HEAD_DIM, dtype=torch.float32)
    outputs = torch.stack([causal(q, k, v, still(q.shape[1]), rules) for _ in range(2000)])
    assert set(outputs[:, 0, 0, 0, 0].tolist()) == {0.0, 2.0}
    assert (outputs.mean(0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("flex", [False, True])
def test_compiled_code_serves_packs_of_any_documents(flex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.models.attention._flex_works", lambda *_: flex)
    counter = CompileCounter()
    q, k, v = (x.requires_grad_(not flex) for x in random_qkv(1, 256))  # on a CPU FlexAttention has no gradient

    @torch.compile(backend=counter)
    def layer(q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return mask(q * 2, k, v, still(q.shape[1]), PLAIN) + 1

    counts = []
    trees: list[list[Tree]] = [[100, 20], [5, (5, [30, 9]), 7], [256], [1, 2, (3, [4, 5]), 6, 7]]
    for lengths in trees:
        layout = line(*lengths, width=256)
        outputs = layer(q, k, v, mask=Causal(256, {PLAIN}, CPU, layout, head_dim=HEAD_DIM, dtype=torch.float32))
        expected = by_definition(q * 2, k, v, layout, PLAIN) + 1
        torch.testing.assert_close(outputs[real(layout)], expected[real(layout)])
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


L4, H200, T4 = (8, 9), (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "flex"),
    [
        (L4, 128, torch.bfloat16, True),
        (L4, 128, torch.float32, False),
        (L4, 64, torch.float32, True),
        (L4, 256, torch.bfloat16, False),
        (H200, 128, torch.float32, True),
        (H200, 256, torch.float32, True),
        (H200, 8, torch.bfloat16, False),
        (T4, 64, torch.float32, False),
    ],
)
def test_a_gpu_gets_flex_attention_for_heads_whose_blocks_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], head_dim: int, dtype: torch.dtype, flex: bool
) -> None:
    """As Triton compiled it for each, and as torch refuses it for narrower ones."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    monkeypatch.setattr(attention, "can_compile_c", lambda: True)
    assert _flex_works.__wrapped__(torch.device("cuda"), head_dim, dtype) is flex


def test_triton_is_not_asked_for_kernels_where_it_could_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, headers = tmp_path / "gcc", tmp_path / "include"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(headers))
    headers.mkdir()
    compiler.touch(mode=0o755)
    assert not can_compile_c()
    (headers / "Python.h").touch()
    assert can_compile_c()
    compiler.unlink()
    assert not can_compile_c()

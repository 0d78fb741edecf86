"""Attention: every position sees itself and what precedes it in its document, exactly, in what each family makes of it.

A line holds several documents, which may share what they begin with; what a position sees is worked out once per
batch, in `Causal`, for all layers. On CUDA, FlexAttention skips the blocks of scores that nobody sees; elsewhere (and
where FlexAttention can't be used) each segment is attended to by itself.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton

from trainers.models.rope import RotaryEmbedding, Rotation
from trainers.models.short_attention import ShortSegments
from trainers.planning.memory import SHORT_SEGMENT
from trainers.training.collate import Layout, Segment

BLOCK = 128
"""Positions in a block of FlexAttention."""


LEAST_HEAD = 16
NARROW_HEAD_BYTES = 256
FOR_WIDER_HEADS = frozenset({(8, 0), (9, 0), (10, 0), (10, 3)})
"""Compute capabilities with 163 kB of shared memory and more. The blocks that FlexAttention chooses for wider heads
(more than 128 numbers in bf16, 64 in fp32) need more than the 99 kB of others (L4, RTX):
https://github.com/pytorch/pytorch/issues/198224. Compiled for an L4, heads of 128 take 97 kB in bf16, 145 in fp32."""


class Rules(NamedTuple):
    """How a layer weighs what its positions see."""

    window: int | None
    """Tokens that one attends to at most, itself included. None: all that precede it."""
    scale: float
    softcap: float | None
    """Scores x become c * tanh(x / c)."""
    dropout: float


Attend = Callable[[Tensor, Tensor, Tensor, Rotation, Rules], Tensor]
"""Queries [b, s, h, d], keys and values [b, s, kv, d], the rotation that queries and keys still need, rules -> outputs
[b, s, h, d]."""


class Attention(nn.Module):
    """The attention of one layer. Queries and keys are normed (where a family does that) before they are rotated.

    Parameters carry the names of torchtune's MultiHeadAttention, whose norms come after the rotation.
    """

    kv_cache = None  # torchtune's decoder asks; `generate` has caches of its own
    cache_enabled = False

    def __init__(
        self,
        *,
        head_dim: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        pos_embeddings: RotaryEmbedding,
        window: int | None,
        scale: float,
        softcap: float | None,
        dropout: float,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = q_proj, k_proj, v_proj, output_proj
        self.pos_embeddings = pos_embeddings
        self.q_norm, self.k_norm = q_norm, k_norm
        self._rules = Rules(window, scale, softcap, dropout)

    @property
    def rules(self) -> Rules:
        """Dropout is for training only."""
        return self._rules if self.training else self._rules._replace(dropout=0.0)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Attend | None = None,
        input_pos: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """[b, s, d] -> [b, s, d], or of the positions `wanted` [n] only, [b, n, d].

        `mask` says what the positions see; it is made once for all layers (`decoder.causal`). None: all that precedes
        them, worked out here. `input_pos` [b, s] holds positions within a document; None: 0, 1, 2, ...
        """
        b, s, _width = x.shape
        q, k, v = (proj(x).view(b, s, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        seen = mask if mask is not None else Causal(s, {self.rules}, x.device, head_dim=self.head_dim, dtype=x.dtype)
        attended = seen(q, k, v, self.pos_embeddings.at(s, input_pos), self.rules).flatten(2)
        output: Tensor = self.output_proj(attended if wanted is None else attended.index_select(1, wanted))
        return output


class Causal:
    """What the positions of one batch see, for every layer of a model; an `Attend`."""

    def __init__(
        self,
        width: int,
        rules: Collection[Rules],
        device: torch.device,
        layout: Layout | None = None,
        *,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        """For lines of `width` positions and layers of `rules`, whose heads hold `head_dim` numbers of `dtype`.

        `layout` says how the documents of one line lie and what they share; the outputs of padding are finite and
        otherwise undefined. None: each line is one document.
        """
        self._segments = None if layout is None else layout.segments
        self._narrow = frozenset(rule.window for rule in rules if rule.window is not None and rule.window < width)
        short = layout is not None and max(segment.seen for segment in layout.segments) < SHORT_SEGMENT
        windows = {self._window(rule) for rule in rules}
        capped = any(rule.softcap is not None for rule in rules)
        dropping = any(rule.dropout for rule in rules)
        self._blocks: dict[int | None, BlockMask] = {}
        # Explicit matrices, where SDPA can't make do with its own causal one: of a line, or of each segment.
        self._visible: dict[int | None, Tensor] = {}
        self._parts: dict[int | None, list[Tensor | None]] = {}
        self._short: ShortSegments | None = None
        if _flex_works(device, head_dim, dtype) and not dropping:
            needed = windows if layout is not None or capped else windows - {None}
            self._blocks = {window: block_mask(width, window, device, layout) for window in needed}
        elif layout is None:
            self._visible = {w: _band(width, w, device) for w in windows if capped or w is not None}
        elif short and device.type == "cpu" and not capped and not dropping:
            self._short = ShortSegments(layout.segments)
        else:
            self._parts = {
                w: [_part(segment, w, device, always=capped) for segment in layout.segments] for w in windows
            }
        # Of its own: compiled code that asked for the segments would be for as many of them only.
        self._apart = layout is not None and not self._blocks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, rules: Rules) -> Tensor:
        window = self._window(rules)
        if self._apart:
            outputs: Tensor = self._by_segment(q, k, v, rotation, rules)
            return outputs
        q, k = rotation(q), rotation(k)
        if window in self._blocks:
            return flex_attend(q, k, v, self._blocks[window], rules)
        return attend(q, k, v, self._visible.get(window), rules)

    def _window(self, rules: Rules) -> int | None:
        """None where nothing lies outside the window."""
        return rules.window if rules.window in self._narrow else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled anew for the documents of each batch
    def _by_segment(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, rules: Rules) -> Tensor:
        """Padding gets zeros."""
        assert self._segments is not None  # noqa: S101  -- nobody else calls it
        if self._short is not None:
            return self._short(q, k, v, rotation, window=self._window(rules), scale=rules.scale)
        q, k = rotation(q), rotation(k)
        widths, dtype = [end - start for start, end, _ in self._segments], q.dtype
        if q.device.type == "cpu" and max(widths) < SHORT_SEGMENT:
            q, k, v = q.float(), k.float(), v.float()
        padding = q.shape[1] - self._segments[-1].end
        # Split at once: the gradient of a split is one concatenation, that of every slice a tensor of the whole line.
        queries, keys, values = (torch.split(x, [*widths, padding], dim=1) for x in (q, k, v))
        number = {segment.start: i for i, segment in enumerate(self._segments)}
        outputs = []
        for i, part in enumerate(self._parts[self._window(rules)]):
            path = [*(number[start] for start, _ in self._segments[i].before), i]
            seen_keys, seen_values = (
                torch.cat([x[j] for j in path], 1) if len(path) > 1 else x[i] for x in (keys, values)
            )
            outputs.append(attend(queries[i], seen_keys, seen_values, part, rules))
        return torch.cat([*outputs, torch.zeros_like(queries[-1])], 1).to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, rules: Rules) -> Tensor:
    """Of queries that are rotated, over all of `k` and `v` ([b, t, kv, d]) that `visible` allows: bool, [s, t] or
    [b, 1, s, t].

    None: causal, for s = t. `visible` has to be given where the rules have a soft-cap; their window is `visible`'s
    business. A position that sees nothing gives NaN.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, h or kv, s or t, d]
    if rules.softcap is None and q.device.type == "cpu":
        grouped = True
    else:  # not every CUDA kernel takes groups, and without one of them SDPA falls back to a matrix of scores
        grouped = False
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if rules.softcap is None:
        output = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            is_causal=visible is None,
            dropout_p=rules.dropout,
            scale=rules.scale,
            enable_gqa=grouped,
        )
        return output.transpose(1, 2)
    if visible is None:
        raise ValueError("soft-capped attention needs an explicit matrix of what is visible")
    scores = rules.softcap * torch.tanh(q @ k.transpose(2, 3) * (rules.scale / rules.softcap))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (functional.dropout(weights, rules.dropout) @ v).transpose(1, 2)


VARIANTS = 64
"""Of compiled code: for each combination of window, soft-cap, packed or not, with gradients or without, with or without
`wanted`, and twice while the width is new."""


def allow_variants() -> None:
    """So that compiled code is compiled again for what is new to it, and doesn't give up after eight times: it would
    silently run uncompiled then, with a matrix of scores. Holds for the calling thread only, as torch's settings do;
    activations are recomputed by another thread than made them."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


def _flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled; or as it is, where it becomes part of what is being compiled."""
    if torch.compiler.is_compiling():
        return cast(Callable[..., Tensor], flex_attention)
    allow_variants()
    return _compiled_flex_attention()


def flex_attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, rules: Rules, flex: Callable[..., Tensor] | None = None
) -> Tensor:
    """The same by FlexAttention, which has no dropout. `flex` stands in for the compiled one."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output: Tensor = (flex or _flex_attention())(
        q,
        k,
        v,
        score_mod=None if rules.softcap is None else _capped(rules.softcap),
        block_mask=blocks,
        scale=rules.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.transpose(1, 2)


def block_mask(width: int, window: int | None, device: torch.device, layout: Layout | None = None) -> BlockMask:
    """The blocks that FlexAttention has to compute, for lines as `Causal` takes them.

    Worked out from what holds of whole blocks: creating it from single positions (torch's create_block_mask) takes a
    matrix [s, s] or a compilation. A block in which nothing is seen may be among them where rows share what they begin
    with, never one too few. Waits for nothing on the device.
    """
    shared = layout is not None and any(segment.before for segment in layout.segments)
    # Distances can be told by places in the line where nothing stands between a document's positions.
    positions = layout.positions if layout is not None and shared else torch.arange(width, device=device)[None]
    until = torch.full_like(positions, width) if layout is None else layout.until

    def sees(_b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = query >= key
        if layout is not None:
            allowed = allowed & (query < until[0, key])
        if window is not None:
            allowed = allowed & (positions[0, query] - positions[0, key] < window)
        return allowed

    starts = torch.arange(0, width, BLOCK, device=device)
    ends = (starts + BLOCK - 1).clamp(max=width - 1)
    query, key = (torch.arange(len(starts), device=device).view(shape) for shape in ((1, 1, -1, 1), (1, 1, 1, -1)))
    some = (key <= query) & (starts[query] < _of_blocks(until, max)[key])
    whole = (key < query) & (ends - starts == BLOCK - 1)[query] & (ends[query] < _of_blocks(until, min)[key])
    if window is not None:
        lowest, highest = _of_blocks(positions, min), _of_blocks(positions, max)
        some = some & ((key == query) | (lowest[query] - highest[key] < window))
        whole = whole & (highest[query] - lowest[key] < window)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(some & whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(width, width)
    )


def _of_blocks(values: Tensor, which: Callable[..., Any]) -> Tensor:
    """The least or the greatest of `values` [1, s] in each block of positions [blocks]."""
    beyond = values[:, -1:].expand(-1, -values.shape[1] % BLOCK)  # the last block is filled up with what is in it
    blocks = torch.cat([values, beyond], 1).view(-1, BLOCK)
    return blocks.amin(1) if which is min else blocks.amax(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [b, 1, query blocks, key blocks] -> how many are true for each query block, and which, these first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts, blocks.int().argsort(dim=-1, descending=True, stable=True).int()


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, _b: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@cache
def _flex_works(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether FlexAttention can be compiled for `device`: by Triton, which itself compiles C at run time, and compiles
    nothing in bf16 for what came before compute capability 8.0, nor products of matrices narrower than 16."""
    if device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(device)
    fits = head_dim * dtype.itemsize <= NARROW_HEAD_BYTES or capability in FOR_WIDER_HEADS
    suitable = capability >= (8, 0) and head_dim >= LEAST_HEAD and fits
    return suitable and bool(has_triton()) and can_compile_c()


def can_compile_c() -> bool:
    """Whether there is a C compiler, and what it needs of Python, which a system's own lacks without its -dev."""
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    return compiler and (Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h").exists()  # as Triton


def _band(width: int, window: int | None, device: torch.device, before: int = 0) -> Tensor:
    """Bool [width, before + width]: what the positions (rows) of a document see that `before` others precede."""
    visible = torch.ones(width, before + width, dtype=torch.bool, device=device).tril(before)
    return visible if window is None else visible.triu(before + 1 - window)


def _part(segment: Segment, window: int | None, device: torch.device, *, always: bool) -> Tensor | None:
    """What a segment sees of those before it and of itself; None where SDPA's causal matrix will do."""
    before = sum(end - start for start, end in segment.before)
    width = segment.end - segment.start
    if not always and not before and (window is None or width <= window):
        return None
    return _band(width, window, device, before)

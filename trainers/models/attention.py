"""Causal attention within documents: each position attends to itself and to those before it in its document.

A line of tokens holds several documents, which may share a prefix. What each position attends to is worked out once per
batch for all layers, in `Causal`. On CUDA, FlexAttention skips blocks of scores that are masked entirely; on other
devices, and where FlexAttention can't be used, attention is computed segment by segment.
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
"""The smallest head_dim that FlexAttention's kernels take: Triton multiplies no narrower matrices."""
NARROW_HEAD_BYTES = 256
"""FlexAttention's blocks of heads of up to so many bytes (head_dim times bytes per element) fit every supported GPU."""
FOR_WIDER_HEADS = frozenset({(8, 0), (9, 0), (10, 0), (10, 3)})
"""Compute capabilities with at least 163 kB of shared memory. The blocks that FlexAttention chooses for wider heads
(head_dim above 128 in bf16, above 64 in fp32) need more than the 99 kB of other GPUs (L4, RTX):
https://github.com/pytorch/pytorch/issues/198224. Compiled for an L4, heads of 128 take 97 kB in bf16, 145 in fp32."""


class Rules(NamedTuple):
    """The settings of a layer's attention."""

    window: int | None
    """Number of tokens that a token attends to at most, itself included. None: it attends to all before it."""
    scale: float
    """Queries times keys are multiplied by this."""
    softcap: float | None
    """Scores x become c * tanh(x / c)."""
    dropout: float
    """Probability with which an attention weight is dropped."""


Attend = Callable[[Tensor, Tensor, Tensor, Rotation, Rules], Tensor]
"""A function of queries [b, s, h, d], keys and values [b, s, kv, d], the rotation to apply to queries and keys, and
rules. Returns outputs [b, s, h, d]."""


class Attention(nn.Module):
    """The attention of one layer. Queries and keys are normalised, in families that do so, before they are rotated.

    Parameters have the names of torchtune's MultiHeadAttention, which normalises after the rotation.
    """

    kv_cache = None  # read by torchtune's decoder; `generate` has its own caches
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
        """The layer's settings; without dropout in eval mode."""
        return self._rules if self.training else self._rules._replace(dropout=0.0)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Attend | None = None,
        input_pos: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """[b, s, d] -> [b, s, d], or [b, n, d] for the positions `wanted` [n] only.

        `mask` computes the attention; `decoder.causal` makes it once for all layers. None: each position attends to all
        before it. `input_pos` [b, s] holds positions within a document; None: 0, 1, 2, ...
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
    """An `Attend` for one batch and all layers of a model: causal attention within documents."""

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
        """For lines of `width` positions, and layers with `rules`, whose heads have `head_dim` elements of `dtype`.

        `layout` describes the documents in a line and the prefixes they share; outputs for padding are finite but
        otherwise undefined. None: each line is one document.
        """
        self._segments = None if layout is None else layout.segments
        self._narrow = frozenset(rule.window for rule in rules if rule.window is not None and rule.window < width)
        short = layout is not None and max(segment.seen for segment in layout.segments) < SHORT_SEGMENT
        windows = {self._window(rule) for rule in rules}
        capped = any(rule.softcap is not None for rule in rules)
        dropping = any(rule.dropout for rule in rules)
        self._blocks: dict[int | None, BlockMask] = {}
        # Masks, where SDPA's is_causal isn't enough: of a whole line, or of each segment.
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
        # A flag of its own, because compiled code that looked at the segments would be specialised to their number.
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
        """The window of a layer; None if it is at least as wide as the line."""
        return rules.window if rules.window in self._narrow else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled anew for the documents of each batch
    def _by_segment(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, rules: Rules) -> Tensor:
        """Attention computed segment by segment; outputs for padding are zeros."""
        assert self._segments is not None  # noqa: S101  -- nobody else calls it
        if self._short is not None:
            return self._short(q, k, v, rotation, window=self._window(rules), scale=rules.scale)
        q, k = rotation(q), rotation(k)
        widths, dtype = [end - start for start, end, _ in self._segments], q.dtype
        if q.device.type == "cpu" and max(widths) < SHORT_SEGMENT:
            q, k, v = q.float(), k.float(), v.float()
        padding = q.shape[1] - self._segments[-1].end
        # One split, whose gradient is one concatenation; that of each slice would be a tensor of the whole line.
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
    """Attention of rotated queries over those keys and values ([b, t, kv, d]) that `visible` (bool, [s, t] or
    [b, 1, s, t]) allows.

    `visible` None: causal, for s = t. With a soft-cap it is required. It must account for the window, which is not read
    from `rules`. The output of a position that attends to nothing is NaN.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, h or kv, s or t, d]
    if rules.softcap is None and q.device.type == "cpu":
        grouped = True
    else:  # not every CUDA kernel supports grouped queries; without one, SDPA would materialise all scores
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
"""Enough variants of compiled code: one for each combination of window, soft-cap, packed or not, with or without
gradients, with or without `wanted`; and two of each while the width is new."""


def allow_variants() -> None:
    """Raises torch's limit of recompilations from eight to `VARIANTS`. Beyond its limit, FlexAttention would silently
    run uncompiled, and materialise all scores. Affects only the calling thread, as torch's settings are per thread;
    activation checkpointing recomputes in another thread."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


def _flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled; uncompiled if the caller itself is being compiled."""
    if torch.compiler.is_compiling():
        return cast(Callable[..., Tensor], flex_attention)
    allow_variants()
    return _compiled_flex_attention()


def flex_attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, rules: Rules, flex: Callable[..., Tensor] | None = None
) -> Tensor:
    """As `attend`, by FlexAttention, which has no dropout. `flex` replaces the compiled function in tests."""
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
    """The blocks of scores that FlexAttention has to compute, for lines as `Causal` takes them.

    They are worked out from the bounds of whole blocks, as torch's create_block_mask, which looks at single positions,
    needs a matrix [s, s] or a compilation. If rows share a prefix, a block that is masked entirely may be among them;
    no block is ever missing. Doesn't synchronise with the device.
    """
    shared = layout is not None and any(segment.before for segment in layout.segments)
    # If no rows share a prefix, each document is contiguous: distances in the line are distances in the document.
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
    """The minimum or maximum (`which`) of `values` [1, s] in each block of positions; [blocks]."""
    beyond = values[:, -1:].expand(-1, -values.shape[1] % BLOCK)  # fills the last block up with its own last value
    blocks = torch.cat([values, beyond], 1).view(-1, BLOCK)
    return blocks.amin(1) if which is min else blocks.amax(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [b, 1, query blocks, key blocks] -> for each query block the number of true entries, and the indices of all
    key blocks, those of true entries first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts, blocks.int().argsort(dim=-1, descending=True, stable=True).int()


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, _b: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@cache
def _flex_works(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether FlexAttention can be compiled for `device`. It needs Triton, which needs a C compiler at run time, has no
    bf16 below compute capability 8.0, and multiplies no matrices narrower than 16."""
    if device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(device)
    fits = head_dim * dtype.itemsize <= NARROW_HEAD_BYTES or capability in FOR_WIDER_HEADS
    suitable = capability >= (8, 0) and head_dim >= LEAST_HEAD and fits
    return suitable and bool(has_triton()) and can_compile_c()


def can_compile_c() -> bool:
    """Whether there are a C compiler and Python's headers (for a system's Python, those are in its -dev package)."""
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    return compiler and (Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h").exists()  # as Triton


def _band(width: int, window: int | None, device: torch.device, before: int = 0) -> Tensor:
    """Bool [width, before + width]: what `width` positions (rows) attend to that come after `before` others."""
    visible = torch.ones(width, before + width, dtype=torch.bool, device=device).tril(before)
    return visible if window is None else visible.triu(before + 1 - window)


def _part(segment: Segment, window: int | None, device: torch.device, *, always: bool) -> Tensor | None:
    """The mask of a segment over those before it and itself; None if SDPA's is_causal is enough and not `always`."""
    before = sum(end - start for start, end in segment.before)
    width = segment.end - segment.start
    if not always and not before and (window is None or width <= window):
        return None
    return _band(width, window, device, before)

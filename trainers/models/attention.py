"""Attention: every position sees itself and what precedes it in its document, exactly, in what each family makes of it.

A pack holds several documents in a row; what a position sees is worked out once per batch, in `Causal`, and shared by
all layers. On CUDA, FlexAttention skips the blocks of scores that nobody sees; elsewhere (and where FlexAttention can't
be used) each document is attended to by itself.
"""

import os
import shutil
from collections.abc import Callable, Collection
from functools import cache
from typing import NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton

from trainers.models.rope import RotaryEmbedding

BLOCK = 128
"""Positions in a block of FlexAttention."""


class Rules(NamedTuple):
    """How a layer weighs what its positions see."""

    window: int | None
    """Tokens that one attends to at most, itself included. None: all that precede it."""
    scale: float
    softcap: float | None
    """Scores x become c * tanh(x / c)."""
    dropout: float


Attend = Callable[[Tensor, Tensor, Tensor, Rules], Tensor]
"""Queries [b, s, h, d], keys and values [b, s, kv, d], rules -> outputs [b, s, h, d]."""


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
        self, x: Tensor, _: Tensor | None = None, *, mask: Attend | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """[b, s, d] -> [b, s, d]. The names of the arguments are those that torchtune's layers call.

        `mask` says what the positions see; it is made once for all layers (`decoder.causal`). None: all that precedes
        them, worked out here. `input_pos` [b, s] holds positions within a document; None: 0, 1, 2, ...
        """
        b, s, _width = x.shape
        q, k, v = (proj(x).view(b, s, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.pos_embeddings(q, input_pos=input_pos), self.pos_embeddings(k, input_pos=input_pos)
        seen = mask if mask is not None else Causal(s, {self.rules}, x.device)
        output: Tensor = self.output_proj(seen(q, k, v, self.rules).flatten(2))
        return output


class Causal:
    """What the positions of one batch see, for every layer of a model; an `Attend`."""

    def __init__(
        self, width: int, rules: Collection[Rules], device: torch.device, documents: Tensor | None = None
    ) -> None:
        """For rows of `width` positions and layers of `rules`.

        `documents` [b, s] numbers the documents of packed rows, 0, 1, 2, ... from the left, and has -1 for padding,
        whose outputs are finite and otherwise undefined. None: each row is one document.
        """
        self._packed = documents is not None
        self._narrow = frozenset(rule.window for rule in rules if rule.window is not None and rule.window < width)
        windows = {self._window(rule) for rule in rules}
        capped = any(rule.softcap is not None for rule in rules)
        self._blocks: dict[int | None, BlockMask] = {}
        self._visible: dict[int | None, Tensor] = {}
        if _flex_works(device) and not any(rule.dropout for rule in rules):
            needed = windows if self._packed or capped else windows - {None}
            self._blocks = {window: block_mask(width, window, device, documents) for window in needed}
            return
        # An explicit matrix [s, s] is needed only where SDPA can't make do with its own causal one.
        self._visible = {window: _band(width, window, device) for window in windows if capped or window is not None}
        if documents is not None:
            self._runs, self._is_document = _runs(documents)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        window = self._window(rules)
        if window in self._blocks:
            return flex_attend(q, k, v, self._blocks[window], rules)
        if self._packed:
            outputs: Tensor = self._by_document(q, k, v, rules)
            return outputs
        return attend(q, k, v, self._visible.get(window), rules)

    def _window(self, rules: Rules) -> int | None:
        """None where nothing lies outside the window."""
        return rules.window if rules.window in self._narrow else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled anew for the documents of each batch
    def _by_document(self, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        """Padding gets zeros."""
        window = self._window(rules)
        visible = self._visible.get(window)
        outputs = []
        parts = zip(*(torch.split(x.flatten(0, 1), self._runs) for x in (q, k, v)), self._is_document, strict=True)
        for q_run, k_run, v_run, is_document in parts:
            if not is_document:
                outputs.append(torch.zeros_like(q_run))
                continue
            n = len(q_run)
            plain = rules.softcap is None and (window is None or n <= window)
            part = None if plain or visible is None else visible[:n, :n]
            outputs.append(attend(q_run[None], k_run[None], v_run[None], part, rules)[0])
        return torch.cat(outputs).view(q.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, rules: Rules) -> Tensor:
    """An `Attend` over all of `k` and `v` ([b, t, kv, d]) that `visible` allows: bool, [s, t] or [b, 1, s, t].

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


# Compiled once for each combination of window, soft-cap, packed or not, with gradients or without, and twice while the
# width is new. Past the limit it would silently run uncompiled, with a matrix of scores: `fullgraph` raises then.
@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


def flex_attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, rules: Rules, flex: Callable[..., Tensor] | None = None
) -> Tensor:
    """An `Attend` by FlexAttention, which has no dropout. `flex` stands in for the compiled one."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output: Tensor = (flex or _compiled_flex_attention())(
        q,
        k,
        v,
        score_mod=None if rules.softcap is None else _capped(rules.softcap),
        block_mask=blocks,
        scale=rules.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.transpose(1, 2)


def block_mask(width: int, window: int | None, device: torch.device, documents: Tensor | None = None) -> BlockMask:
    """The blocks that FlexAttention has to compute, for documents as `Causal` takes them.

    Worked out from the ends of the blocks, as documents lie one behind the other: creating it from single positions
    (torch's create_block_mask) takes a matrix [b, s, s] or a compilation. Waits for nothing on the device.
    """

    def sees(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = query >= key
        if window is not None:
            allowed = allowed & (query - key < window)
        if documents is not None:
            allowed = allowed & (documents[b, query] == documents[b, key])
        return allowed

    starts = torch.arange(0, width, BLOCK, device=device)
    ends = (starts + BLOCK - 1).clamp(max=width - 1)
    query, key = (torch.arange(len(starts), device=device).view(shape) for shape in ((1, 1, -1, 1), (1, 1, 1, -1)))
    some = key <= query
    whole = (key < query) & (ends - starts == BLOCK - 1).view(query.shape)
    if window is not None:
        some = some & ((query - key - 1) * BLOCK + 1 < window)  # the nearest pair of the two blocks; in one block, <= 0
        whole = whole & ((query - key) * BLOCK + BLOCK - 1 < window)  # the farthest pair
    if documents is not None:
        rising = torch.where(documents < 0, width, documents)  # padding comes last
        first, last = rising[:, starts], rising[:, ends]  # [b, blocks]
        some = some & (first[:, None, :, None] <= last[:, None, None, :])
        whole = whole & (last[:, None, :, None] == first[:, None, None, :])
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(some & whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(width, width)
    )


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
def _flex_works(device: torch.device) -> bool:
    """Whether FlexAttention can be compiled for `device`: by Triton, which itself needs a C compiler at run time."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 5):
        return False
    return bool(has_triton()) and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


def _band(width: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [width, width]: what the positions (rows) of one document see."""
    visible = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


def _runs(documents: Tensor) -> tuple[list[int], list[bool]]:
    """Lengths of the documents and of the paddings of all rows, one behind the other; whether each is a document."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    lengths = starts.diff(append=starts.new_tensor([documents.numel()]))
    return lengths.tolist(), (documents.flatten()[starts] >= 0).tolist()

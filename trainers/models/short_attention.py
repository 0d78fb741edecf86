"""Attention on a CPU for lines whose segments are all short: in float32, with its own backward pass.

PyTorch's attention would have to be called for each segment, with products so small that the calls cost more than the
computation. Here, segments of similar widths with the same segments before them form a group: they are padded to the
widest, and each product is one batch over all segments of the group and all heads. The backward pass computes the
attention weights again, because stored ones, for segments of 256 tokens, would take more memory than everything else
that attention keeps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainers.models.rope import Rotation, rotated
from trainers.training.autograd import Context
from trainers.training.collate import Segment

FILLED = 0.75
"""A segment joins a wider one's group if it has at least this share of its width: computing for the padding then costs
less than another batch of products."""


class _Group(NamedTuple):
    """`members` segments of up to `width` positions, each preceded by the ranges `before`, of `of_before` positions."""

    members: int
    width: int
    before: tuple[tuple[int, int], ...]
    of_before: int
    queries: Tensor
    """The row (see `_Plan`) of each query, [members, kv, width], flattened."""
    keys: Tensor
    """The row of each key and value, [members, kv, of_before + width], flattened."""
    own: slice
    """The place of its queries among those of all groups."""
    own_keys: slice
    """The place of its keys among those of all groups."""
    masked: Tensor
    """Added to scores: 0 or -inf, [1, width * group size, of_before + width]."""


class _Plan(NamedTuple):
    """How to gather a line's rows into groups, and to scatter results back.

    A row holds the numbers of one key-value head at one position: its key or value, or the queries that share the
    head. Rows are in the order [s, kv]; one row of zeros after them stands for padding."""

    groups: tuple[_Group, ...]
    places: Tensor
    """The index of each row among the queries of all groups, [s, kv], flattened; padding has the one after the last."""
    key_places: Tensor
    """The same among the keys of all groups."""
    queries: int
    """Number of rows of queries in all groups, padding included."""
    keys: int
    """Number of rows of keys in all groups, padding included."""


class ShortSegments:
    """Attention within the segments of one line, without soft-cap or dropout. Outputs for padding are zeros."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._plans: dict[tuple[int, int, int, int | None], _Plan] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, *, window: int | None, scale: float
    ) -> Tensor:
        """Queries [1, s, h, d], keys and values [1, s, kv, d] -> outputs [1, s, h, d]."""
        key = (q.shape[1], k.shape[2], q.shape[2] // k.shape[2], window)
        if key not in self._plans:
            self._plans[key] = _plan(self._segments, *key)
        return _attend(q, k, v, rotation.cos, rotation.sin, self._plans[key], scale)


def _plan(segments: Sequence[Segment], positions: int, kv: int, group_size: int, window: int | None) -> _Plan:
    nothing = positions * kv
    heads = torch.arange(kv)
    groups: list[_Group] = []
    places, key_places = (torch.full((positions, kv), -1) for _ in range(2))
    first, first_key = 0, 0
    for before, together in _alike(segments):
        members, width, preceding = len(together), together[0].end - together[0].start, _positions(before)
        seen = len(preceding) + width
        queries, keys = torch.full((members, kv, width), nothing), torch.full((members, kv, seen), nothing)
        keys[:, :, : len(preceding)] = preceding * kv + heads[:, None]
        for number, (start, end, _) in enumerate(together):
            rows = torch.arange(start, end) * kv + heads[:, None]  # [kv, end - start]
            queries[number, :, : end - start] = rows
            keys[number, :, len(preceding) : len(preceding) + end - start] = rows
            at, head = torch.arange(end - start)[:, None], number * kv + heads
            places[start:end] = first + head * width + at
            key_places[start:end] = first_key + head * seen + len(preceding) + at
        visible = torch.ones(width, seen, dtype=torch.bool).tril(len(preceding))
        if window is not None:
            visible = visible.triu(len(preceding) + 1 - window)
        masked = torch.zeros(width, seen).masked_fill_(~visible, -torch.inf)
        own, own_keys = (slice(a, a + one.numel()) for a, one in ((first, queries), (first_key, keys)))
        groups.append(
            _Group(
                members,
                width,
                before,
                len(preceding),
                queries.flatten(),
                keys.flatten(),
                own,
                own_keys,
                masked.repeat_interleave(group_size, 0)[None],
            )
        )
        first, first_key = own.stop, own_keys.stop
    places[places < 0], key_places[key_places < 0] = first, first_key
    return _Plan(tuple(groups), places.flatten(), key_places.flatten(), first, first_key)


def _alike(segments: Iterable[Segment]) -> Iterator[tuple[tuple[tuple[int, int], ...], list[Segment]]]:
    """The segments of each group, the widest first, and the ranges that precede each of them."""
    children: dict[tuple[tuple[int, int], ...], list[Segment]] = {}
    for segment in segments:
        children.setdefault(segment.before, []).append(segment)
    for before, siblings in children.items():
        together: list[Segment] = []
        for segment in sorted(siblings, key=lambda one: one.start - one.end):
            if together and segment.end - segment.start < FILLED * (together[0].end - together[0].start):
                yield before, together
                together = []
            together.append(segment)
        yield before, together


def _positions(ranges: Iterable[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(start, end) for start, end in ranges)])


def _rows(x: Tensor) -> Tensor:
    """[1, s, kv, n] -> rows [s * kv + 1, n], of which the last is zeros."""
    rows = torch.empty(x.shape[1] * x.shape[2] + 1, x.shape[3], dtype=torch.float32)
    rows[:-1].view(x.shape[1:]).copy_(x[0])
    rows[-1] = 0
    return rows


def _places(rows: int, width: int) -> Tensor:
    """Room for `rows` of `width` numbers, uninitialised, and one row of zeros after them."""
    places = torch.empty(rows + 1, width, dtype=torch.float32)
    places[-1] = 0
    return places


class _ShortAttention(torch.autograd.Function):
    """S = scale Q K^T + mask, P = softmax(S), O = P V. With g the gradient of O, that of V is P^T g, and that of S is
    P * (g V^T - row sums of P * g V^T), from which those of Q and K follow."""

    @staticmethod
    def forward(
        ctx: "_OfShortAttention",
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: _Plan,
        scale: float,
    ) -> Tensor:
        _, s, h, d = q.shape
        kv = k.shape[2]
        group_size = h // kv
        cos, sin = cos.view(s, 1, 1, -1), sin.view(s, 1, 1, -1)
        joined = torch.empty(s, kv, group_size + 1, d, dtype=torch.float32)
        joined[:, :, :-1], joined[:, :, -1] = q[0].view(s, kv, group_size, d), k[0]
        rows = _rows(rotated(joined, cos, sin).view(1, s, kv, -1))
        del joined
        queries, keys = rows[:, :-d], rows[:, -d:]
        values = _rows(v)
        outputs = _places(plan.queries, group_size * d)
        saved: list[Tensor] = []
        for group in plan.groups:
            batch = group.members * kv
            of_group = queries.index_select(0, group.queries).view(batch, -1, d)
            seen, seen_values = (x.index_select(0, group.keys).view(batch, -1, d) for x in (keys, values))
            weights = _weights(of_group, seen, group, scale)
            torch.bmm(weights, seen_values, out=outputs[group.own].view(batch, -1, d))
            saved += [of_group, seen, seen_values]
        ctx.save_for_backward(cos, sin, *saved)
        ctx.plan, ctx.scale, ctx.group_size, ctx.kv = plan, scale, group_size, kv
        return outputs.index_select(0, plan.places).view(1, s, h, d).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: "_OfShortAttention", d_output: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *saved = ctx.saved_tensors
        plan, scale, group_size, kv = ctx.plan, ctx.scale, ctx.group_size, ctx.kv
        _, s, h, d = d_output.shape
        d_outputs = _rows(d_output.reshape(1, s, kv, group_size * d))
        d_queries = _places(plan.queries, group_size * d)
        d_keys, d_values = (_places(plan.keys, d) for _ in range(2))
        for number, group in enumerate(plan.groups):
            batch = group.members * kv
            of_group, seen, seen_values = saved[3 * number : 3 * number + 3]
            weights = _weights(of_group, seen, group, scale)
            d_attended = d_outputs.index_select(0, group.queries).view(batch, -1, d)
            torch.bmm(weights.transpose(1, 2), d_attended, out=d_values[group.own_keys].view(batch, -1, d))
            d_weights = torch.bmm(d_attended, seen_values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, torch.float32).mul_(scale)
            torch.bmm(d_scores, seen, out=d_queries[group.own].view(batch, -1, d))
            torch.bmm(d_scores.transpose(1, 2), of_group, out=d_keys[group.own_keys].view(batch, -1, d))
        d_rotated = torch.empty(s, kv, group_size + 1, d, dtype=torch.float32)
        d_rotated[:, :, :-1] = d_queries.index_select(0, plan.places).view(s, kv, group_size, d)
        d_rotated[:, :, -1] = d_keys.index_select(0, plan.key_places).view(s, kv, d)
        d_v = d_values.index_select(0, plan.key_places).view(s, kv, d)
        for group in plan.groups:
            for of_places, of_line in ((d_keys, d_rotated[:, :, -1]), (d_values, d_v)):
                _add_shared(of_places[group.own_keys].view(group.members, kv, -1, d), group, of_line)
        joined = rotated(d_rotated, cos, -sin)
        d_q, d_k = (x.to(d_output.dtype) for x in (joined[:, :, :-1], joined[:, :, -1]))
        return d_q.reshape(1, s, h, d), d_k[None], d_v.to(d_output.dtype)[None], None, None, None, None


class _OfShortAttention(Context):
    plan: _Plan
    scale: float
    group_size: int
    kv: int


def _weights(queries: Tensor, keys: Tensor, group: _Group, scale: float) -> Tensor:
    scores = torch.baddbmm(group.masked, queries, keys.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


def _add_shared(of_group: Tensor, group: _Group, of_line: Tensor) -> None:
    """Adds the gradients of the positions before the segments of `group`, in `of_group` [members, kv, t, d], to
    `of_line` [s, kv, d], which has the gradients of the segments' own positions already."""
    shared = of_group[:, :, : group.of_before].sum(0).transpose(0, 1)
    first = 0
    for start, end in group.before:
        of_line[start:end] += shared[first : first + end - start]
        first += end - start


_attend: Callable[..., Tensor] = _ShortAttention.apply

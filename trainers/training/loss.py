"""The output head and its loss in one: summed cross-entropy from hidden states, without the logits ever standing in
memory.

The logits of a long sequence are the largest matrix of a training step ([4096, 128256] float32: 2 GB), and autograd
would keep several of them for the backward pass. Here a chunk of rows goes through the head, gives its share of the
loss *and of the gradients*, and is gone. Nothing is computed twice: the gradient of cross-entropy, softmax(logits) -
target, needs nothing but the logits at hand. (The idea is that of Liger Kernel's fused linear cross-entropy.)
"""

import copy
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TiedLinear

from trainers.models.decoder import Head
from trainers.planning.memory import CHUNK_ELEMENTS, MODULE_CHUNKS
from trainers.training.autograd import Context


class HeadLoss:
    """Hidden states in, summed loss out; `output` is the decoder's head.

    `softcap`: logits x become c * tanh(x / c) (Gemma 2). `chunks`: how many chunks of rows to make, None: as many as
    `CHUNK_ELEMENTS` asks for. `gone_by_next`: the gradient of one call is done with before the next call, and leaves it
    its memory: that of a new matrix has to be cleared by the kernel, page by page.
    """

    def __init__(
        self,
        output: Callable[[Tensor], Tensor],
        vocabulary: int,
        *,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        chunks: int | None = None,
        gone_by_next: bool = False,
        compiled: Callable[[Any], Any] | None = None,
    ) -> None:
        self.output = output
        self.vocabulary = vocabulary
        self.softcap = softcap
        self.label_smoothing = label_smoothing
        self.chunks = chunks
        self.measure = compiled(_loss_and_gradient) if compiled else _loss_and_gradient
        self._matrix: Tensor | None = None
        self._rooms: list[Tensor] | None = [] if gone_by_next else None

    def reading(self, matrix: Tensor) -> Self:
        """This head with `matrix`, as `look_up` returned it, in the place of a tied one."""
        head = copy.copy(self)
        head._matrix = matrix
        return head

    def __call__(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden` [n, d] and `labels` [n] of the trained positions -> the loss, float32 [], and how many of the labels
        were the likeliest token, float64 []. The loss is 0, with zero gradients, for none."""
        grad = torch.is_grad_enabled()  # inside the function it is off

        def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return cast(tuple[Tensor, Tensor], _fused(hidden, weight, labels, self._rows(hidden), grad, self))

        if isinstance(self.output, TiedLinear):
            return fused(hidden, self._tied)
        if isinstance(self.output, Head):
            return cast(tuple[Tensor, Tensor], self.output(hidden, fused))
        return self._through_module(hidden, labels)

    def log_probabilities(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of each label: `hidden` [n, d] and `labels` [n] -> float32 [n]; no label smoothing.

        How much each of them counts is known only when all are, so the gradients can't be made along with them: the
        backward pass makes each chunk's logits again. That costs a third product with the head, and keeps the memory of
        one chunk.
        """

        def fused(hidden: Tensor, weight: Tensor) -> Tensor:
            return cast(Tensor, _fused_each(hidden, weight, labels, self._rows(hidden), self))

        if isinstance(self.output, TiedLinear):
            return fused(hidden, self._tied)
        if isinstance(self.output, Head):
            return cast(Tensor, self.output(hidden, fused))
        return -self._each_through_module(hidden, labels)[0]

    def _through_module(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For a head with layers of its own (an adapter): autograd goes through it, and computes each chunk twice."""
        losses, hits = self._each_through_module(hidden, labels)
        return losses.sum(), hits

    def _each_through_module(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # As many chunks on every rank, whatever its share of a batch: a sharded head is gathered once for each.
        chunks = self.chunks or MODULE_CHUNKS
        parts = zip(hidden.tensor_split(chunks), labels.tensor_split(chunks), strict=True)
        each = [checkpoint(self._chunk, *part, use_reentrant=False) for part in parts]
        return torch.cat([losses for losses, _ in each]), torch.stack([hits for _, hits in each]).sum()

    def _chunk(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.output(hidden).float()
        losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return losses, _hits(logits.detach().argmax(dim=1), labels)

    @property
    def _tied(self) -> Tensor:
        return cast(TiedLinear, self.output).tied_module.weight if self._matrix is None else self._matrix

    def room(self, weight: Tensor, rows: int) -> Tensor:
        """For the gradient of `weight`, which the products of `rows` rows add up to."""
        if not rows:
            return torch.zeros_like(weight)
        if self._rooms is None:
            return torch.empty_like(weight)
        if not self._rooms:
            self._rooms.append(torch.empty_like(weight))
        return self._rooms[0].detach()  # a tensor of its own, which autograd keeps as it is

    def _rows(self, hidden: Tensor) -> int:
        """Of a chunk."""
        if self.chunks is not None:
            return max(1, -(-len(hidden) // self.chunks))
        return max(1, CHUNK_ELEMENTS[hidden.device.type] // self.vocabulary)


def _hits(likeliest: Tensor, labels: Tensor) -> Tensor:
    """How many of `labels` [n] are the `likeliest` tokens [n], float64 []."""
    return (likeliest == labels).sum(dtype=torch.float64)


def _loss_and_gradient(
    logits: Tensor, labels: Tensor, head: HeadLoss, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy [n] of float32 `logits` [n, v] against `labels` [n]; how many of these are the likeliest token, of
    equals the first one; and, in the memory of the logits, the gradient [n, v] of its sum.

    With smoothing e the target is (1 - e) at the label plus e / v everywhere, as in torch.nn.CrossEntropyLoss.
    """
    cap, smoothing = head.softcap, head.label_smoothing
    likeliest = logits.argmax(dim=1, keepdim=True)  # [n, 1]; a soft-cap leaves the order as it is
    slope: Tensor | None = None  # of the soft-cap: 1 - tanh(x / c)^2
    if cap is not None:
        logits.div_(cap).tanh_()
        slope = 1 - logits.square() if with_gradient else None
        logits.mul_(cap)
    highest, at_label = (logits.gather(1, tokens)[:, 0] for tokens in (likeliest, labels[:, None]))  # [n]
    mean = logits.mean(dim=1) if smoothing else 0
    probabilities = torch.softmax(logits, dim=1, out=logits)
    # The highest logit's probability is never so small that it would be 0.
    normaliser = highest - probabilities.gather(1, likeliest)[:, 0].log()  # [n]
    losses = normaliser - (1 - smoothing) * at_label - smoothing * mean
    hits = _hits(likeliest[:, 0], labels)
    if not with_gradient:
        return losses, hits, None
    gradient = probabilities
    gradient.scatter_add_(1, labels[:, None], torch.full_like(gradient[:, :1], smoothing - 1))
    if smoothing:
        gradient.sub_(smoothing / logits.shape[1])
    if slope is not None:
        gradient.mul_(slope)
    return losses, hits, gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Adds `left` @ `right` to `total`; `first`: to nothing, whatever stands there. (To add to numbers in bf16 a CPU
    makes a copy of all of them in fp32.)"""
    if first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum over rows i of cross_entropy(hidden[i] @ weight.T, labels[i])."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: int,
        grad: bool,
        head: HeadLoss,
    ) -> tuple[Tensor, Tensor]:
        for_hidden, for_weight = (grad and needed for needed in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hits = torch.zeros((), dtype=torch.float64, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_weight = head.room(weight, len(hidden)) if for_weight else None
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = functional.linear(hidden[chunk], weight).float()  # [n, v]
            losses, right, gradient = head.measure(logits, labels[chunk], head, for_hidden or for_weight)
            total += losses.sum()
            hits += right
            if gradient is not None:
                gradient = gradient.to(weight.dtype)
                if d_hidden is not None:
                    torch.mm(gradient, weight, out=d_hidden[chunk])
                if d_weight is not None:
                    _add_product(d_weight, gradient.t(), hidden[chunk], first=start == 0)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place, as nobody else has them. A CPU doesn't round the number, in fp32, to their type first.
        d_hidden, d_weight = (None if saved is None else saved.mul_(d_loss) for saved in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None


_fused: Callable[..., Any] = _LinearCrossEntropy.apply


class _LinearLogProbabilities(torch.autograd.Function):
    """-cross_entropy(hidden[i] @ weight.T, labels[i]) of each row i."""

    @staticmethod
    def forward(
        ctx: "_OfLogProbabilities",
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: int,
        head: HeadLoss,
    ) -> Tensor:
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            losses, _, _ = head.measure(functional.linear(hidden[chunk], weight).float(), labels[chunk], head, False)
            logps[chunk] = -losses
        ctx.save_for_backward(hidden, weight, labels)
        ctx.rows, ctx.head = rows, head
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: "_OfLogProbabilities", d_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = ctx.head.room(weight, len(hidden)) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits = functional.linear(hidden[chunk], weight).float()
            _, _, gradient = ctx.head.measure(logits, labels[chunk], ctx.head, True)
            gradient = cast(Tensor, gradient).mul_(-d_logps[chunk, None]).to(weight.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[chunk])
            if d_weight is not None:
                _add_product(d_weight, gradient.t(), hidden[chunk], first=start == 0)
        return d_hidden, d_weight, None, None, None


class _OfLogProbabilities(Context):
    rows: int
    head: HeadLoss


_fused_each: Callable[..., Any] = _LinearLogProbabilities.apply


class _LookUp(torch.autograd.Function):
    """What `look_up` does."""

    @staticmethod
    def forward(ctx: Context, matrix: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        return functional.embedding(tokens, matrix), matrix.view_as(matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_rows: Tensor, d_matrix: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        tokens, d_rows = tokens.flatten(), d_rows.flatten(0, 1)
        return d_matrix.index_put_((tokens,), _summed(tokens, d_rows).to(d_matrix.dtype), accumulate=True), None


def _summed(tokens: Tensor, rows: Tensor) -> Tensor:
    """`rows` [s, d], those of equal `tokens` [s] added up where the token stands first, and zeros elsewhere; in float32
    at least: in bf16 a sum of many stops growing. Waits for nothing on the device, as `unique` would."""
    order = tokens.argsort(stable=True)
    alike = tokens[order]
    begins = torch.cat([torch.ones_like(alike[:1], dtype=torch.bool), alike[1:] != alike[:-1]])
    group = torch.where(begins, torch.arange(len(order), device=order.device), 0).cummax(0).values
    first = torch.empty_like(order).scatter_(0, order, order[group])  # of each position: where its token stands first
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.zeros_like(wide).index_put_((first,), wide, accumulate=True)


_look_up: Callable[..., Any] = _LookUp.apply


def look_up(matrix: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix` [v, d] that is embedding and output head in one, `tokens` [1, s] -> embeddings [1, s, d], and the matrix
    for the head (`HeadLoss.reading`), which has to be the only one to use that.

    The gradients of the rows that were looked up are added to the head's where it stands. By itself autograd makes a
    matrix of zeros for them first, and adds one to the other: a twentieth of a step of a small model.
    """
    return cast(tuple[Tensor, Tensor], _look_up(matrix, tokens))

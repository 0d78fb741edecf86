"""Output head and cross-entropy in one operation, which never holds all logits in memory.

The logits of a long sequence are the largest matrix of a training step ([4096, 128256] float32: 2 GB), and autograd
would keep several such matrices for the backward pass. Here a chunk of rows at a time goes through the head; its share
of the loss *and of the gradients* is added up, and its logits are dropped. Nothing is computed twice, as the gradient
of cross-entropy, softmax(logits) - target, follows from the logits alone. (Liger Kernel's fused linear cross-entropy
works like this.)

Shapes: n hidden states (trained positions) of width d, a vocabulary of v tokens.
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
    """Maps hidden states to their summed loss, through `output`, the decoder's head.

    `softcap` c: logits x become c * tanh(x / c) (Gemma 2). `chunks`: number of chunks of rows; None: as many as
    `CHUNK_ELEMENTS` asks for. `reuse_gradient`: the gradient of the matrix is used up before the next call, so that all
    calls may write it into the same memory. (The kernel has to clear the pages of a new matrix.)
    """

    def __init__(
        self,
        output: Callable[[Tensor], Tensor],
        vocabulary: int,
        *,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        chunks: int | None = None,
        reuse_gradient: bool = False,
        compiled: Callable[[Any], Any] | None = None,
    ) -> None:
        self.output = output
        self.vocabulary = vocabulary
        self.softcap = softcap
        self.label_smoothing = label_smoothing
        self.chunks = chunks
        self.measure = compiled(_loss_and_gradient) if compiled else _loss_and_gradient
        self._matrix: Tensor | None = None
        # The memory of the gradient to reuse, once there is one; a list, as the copies of `reading` share it.
        self._reused: list[Tensor] | None = [] if reuse_gradient else None

    def reading(self, matrix: Tensor) -> Self:
        """This head, reading `matrix`, which `look_up` returned, in the place of the tied one."""
        head = copy.copy(self)
        head._matrix = matrix
        return head

    def __call__(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden` [n, d] and `labels` [n] -> the summed loss, float32 [], and the number of labels that are the
        likeliest token, float64 []. Without labels, the loss is 0 with zero gradients."""
        grad = torch.is_grad_enabled()  # within an autograd.Function it is always off

        def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return cast(tuple[Tensor, Tensor], _fused(hidden, weight, labels, self._rows(hidden), grad, self))

        if isinstance(self.output, TiedLinear):
            return fused(hidden, self._tied)
        if isinstance(self.output, Head):
            return cast(tuple[Tensor, Tensor], self.output(hidden, fused))
        return self._through_module(hidden, labels)

    def log_probabilities(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The log-probability of each label: `hidden` [n, d] and `labels` [n] -> float32 [n]. For heads without label
        smoothing.

        The loss weights them by factors that depend on all of them, so their gradients can't be computed in the forward
        pass: the backward pass computes each chunk's logits again (a third product with the head). So memory stays
        that of one chunk.
        """

        def fused(hidden: Tensor, weight: Tensor) -> Tensor:
            return cast(Tensor, _log_probabilities(hidden, weight, labels, self._rows(hidden), self))

        if isinstance(self.output, TiedLinear):
            return fused(hidden, self._tied)
        if isinstance(self.output, Head):
            return cast(Tensor, self.output(hidden, fused))
        return -self._each_through_module(hidden, labels)[0]

    def _through_module(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For a head that is a module of several layers (with an adapter): by autograd, which computes each chunk
        twice."""
        losses, hits = self._each_through_module(hidden, labels)
        return losses.sum(), hits

    def _each_through_module(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # The number of chunks must be the same on every rank, however many rows it has: a sharded head is gathered once
        # for each.
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

    def gradient_buffer(self, weight: Tensor, rows: int) -> Tensor:
        """Memory for the gradient of `weight` from `rows` rows: zeros if there are none, otherwise uninitialised."""
        if not rows:
            return torch.zeros_like(weight)
        if self._reused is None:
            return torch.empty_like(weight)
        if not self._reused:
            self._reused.append(torch.empty_like(weight))
        return self._reused[0].detach()  # a new tensor on the same memory, which autograd takes without copying it

    def _rows(self, hidden: Tensor) -> int:
        """Rows in a chunk."""
        if self.chunks is not None:
            return max(1, -(-len(hidden) // self.chunks))
        return max(1, CHUNK_ELEMENTS[hidden.device.type] // self.vocabulary)


def _hits(likeliest: Tensor, labels: Tensor) -> Tensor:
    """The number of `labels` [n] that equal the `likeliest` tokens [n], float64 []."""
    return (likeliest == labels).sum(dtype=torch.float64)


def _loss_and_gradient(
    logits: Tensor, labels: Tensor, head: HeadLoss, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From float32 `logits` [n, v] and `labels` [n]: the cross-entropy [n]; the number of labels that are the likeliest
    token (the first one, of equals); and the gradient [n, v] of the summed cross-entropy by the logits before the
    soft-cap, in the memory of the logits. None without `with_gradient`.

    With label smoothing e the target is (1 - e) at the label plus e / v everywhere, as in torch.nn.CrossEntropyLoss.
    """
    cap, smoothing = head.softcap, head.label_smoothing
    likeliest = logits.argmax(dim=1, keepdim=True)  # [n, 1]; the soft-cap keeps the order
    slope: Tensor | None = None  # derivative of the soft-cap: 1 - tanh(x / c)^2
    if cap is not None:
        logits.div_(cap).tanh_()
        slope = 1 - logits.square() if with_gradient else None
        logits.mul_(cap)
    highest, at_label = (logits.gather(1, tokens)[:, 0] for tokens in (likeliest, labels[:, None]))  # [n]
    mean = logits.mean(dim=1) if smoothing else 0
    probabilities = torch.softmax(logits, dim=1, out=logits)
    # log(sum(exp(logits))), from the highest logit, whose probability is the only one that is surely not 0.
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
    """Adds `left` @ `right` to `total`. With `first` it overwrites `total` instead, which may be uninitialised. (To add
    to a bf16 matrix, a CPU makes an fp32 copy of it.)"""
    if first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over rows i of cross_entropy(hidden[i] @ weight.T, labels[i]), and the number of hits. The forward pass
    computes the gradients, too; the backward pass only scales them."""

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
        d_weight = head.gradient_buffer(weight, len(hidden)) if for_weight else None
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
        # In place, as nothing else uses them. A CPU multiplies by the fp32 factor without rounding it to their dtype.
        d_hidden, d_weight = (None if saved is None else saved.mul_(d_loss) for saved in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None


_fused: Callable[..., Any] = _LinearCrossEntropy.apply


class _LogProbabilitiesContext(Context):
    rows: int
    head: HeadLoss


class _LinearLogProbabilities(torch.autograd.Function):
    """-cross_entropy(hidden[i] @ weight.T, labels[i]) of each row i. The backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: _LogProbabilitiesContext,
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
    def backward(ctx: _LogProbabilitiesContext, d_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = ctx.head.gradient_buffer(weight, len(hidden)) if ctx.needs_input_grad[1] else None
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


_log_probabilities: Callable[..., Any] = _LinearLogProbabilities.apply


class _LookUp(torch.autograd.Function):
    """The implementation of `look_up`."""

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
    """Adds up the `rows` [s, d] of equal `tokens` [s]: the result [s, d] has each sum at the token's first position and
    zeros elsewhere. It is in at least float32, as in bf16 the sum of many rows stops growing. Unlike `unique`, this
    doesn't wait for the device."""
    order = tokens.argsort(stable=True)
    alike = tokens[order]
    begins = torch.cat([torch.ones_like(alike[:1], dtype=torch.bool), alike[1:] != alike[:-1]])
    group = torch.where(begins, torch.arange(len(order), device=order.device), 0).cummax(0).values
    first = torch.empty_like(order).scatter_(0, order, order[group])  # first position of each position's token
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.zeros_like(wide).index_put_((first,), wide, accumulate=True)


_look_up: Callable[..., Any] = _LookUp.apply


def look_up(matrix: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For a `matrix` [v, d] that is both embedding and output head, and `tokens` [1, s]: their embeddings [1, s, d],
    and the matrix as the head is to read it (`HeadLoss.reading`). Nothing else may use that one.

    In the backward pass the gradients of the embeddings are added to the head's gradient, in place. Autograd would
    first spread them over a matrix of zeros and then add two matrices: a twentieth of a step of a small model.
    """
    return cast(tuple[Tensor, Tensor], _look_up(matrix, tokens))

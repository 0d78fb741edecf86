"""Adam and AdamW for mixed precision: the model computes with weights in bf16, and the optimizer updates fp32 copies of
them (master weights).

The time of an update is that of reading and writing memory. So it goes through the parameters in pieces of at most
`PIECE` numbers: it converts the gradients of a piece to fp32, updates the copies, and writes the weights while all of
that is in the processor's cache. An fp32 gradient of a whole model, or of its largest matrix, is never in memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trainers.planning.memory import PIECE
from trainers.training.distributed import local


class _Piece(NamedTuple):
    """The same elements of a weight, of its fp32 copy, and of the copy's moments, as one-dimensional views. `step` []
    counts the parameter's updates."""

    weight: Tensor
    copy: Tensor
    moments: tuple[Tensor, ...]
    step: Tensor


class MixedAdam(torch.optim.Adam):
    """torch's fused Adam over fp32 copies, with the same state and the same results.

    `copied` maps each copy to its weight. A step takes the gradients of the weights, sets them to None, updates the
    copies and writes them to the weights. To resume, the state must be restored before the first step.
    """

    def __init__(self, copied: Mapping[nn.Parameter, nn.Parameter], arguments: Mapping[str, Any]) -> None:
        """`arguments`: keyword arguments of torch's Adam, without `fused` and `foreach`."""
        super().__init__(list(copied), **arguments, fused=True)
        self._copied = copied
        self._piece_size = PIECE[local(next(iter(copied))).device.type]
        self._pieces: dict[nn.Parameter, list[_Piece]] = {}
        self._buffer: Tensor | None = None
        self._buffer_parts: dict[tuple[int, ...], list[Tensor]] = {}
        """Views of the buffer, by their lengths: every step needs the same ones."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes none
        (group,) = self.param_groups
        waiting: list[tuple[_Piece, Tensor]] = []  # pieces to update together, with their gradients
        numbers = 0
        copies = [copy for copy in group["params"] if self._copied[copy].grad is not None]
        for copy in copies:
            if copy not in self._pieces:
                self._pieces[copy] = list(self._split(copy))
        if copies:
            torch._foreach_add_([self._pieces[copy][0].step for copy in copies], 1)
        for piece, gradient in self._gradients(copies):
            if waiting and numbers + len(gradient) > self._piece_size:
                self._update(waiting, group)
                waiting, numbers = [], 0
            waiting.append((piece, gradient))
            numbers += len(gradient)
        if waiting:
            self._update(waiting, group)

    def _gradients(self, copies: Iterable[nn.Parameter]) -> Iterator[tuple[_Piece, Tensor]]:
        """Every piece of `copies` with its gradient, which is taken from the weight."""
        for copy in copies:
            weight, pieces = self._copied[copy], self._pieces[copy]
            gradient = local(cast(Tensor, weight.grad)).reshape(-1)
            weight.grad = None
            parts = torch.split(gradient, self._piece_size) if len(pieces) > 1 else [gradient]
            yield from zip(pieces, parts, strict=True)

    def _split(self, copy: nn.Parameter) -> Iterator[_Piece]:
        """The pieces of `copy`. Makes its state if there is none yet."""
        state = self.state[copy]
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.defaults["amsgrad"] else [])]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local(copy).device)
            state.update({name: torch.zeros_like(copy) for name in names})
        flat = [local(one).view(-1) for one in (self._copied[copy], copy, *(state[name] for name in names))]
        for of_weight, of_copy, *of_moments in zip(*(torch.split(one, self._piece_size) for one in flat), strict=True):
            yield _Piece(of_weight, of_copy, tuple(of_moments), state["step"])

    def _update(self, waiting: list[tuple[_Piece, Tensor]], group: Mapping[str, Any]) -> None:
        """Updates the copies of some pieces, and writes them to the weights."""
        pieces, gradients = map(list, zip(*waiting, strict=True))
        weights, copies, moments, steps = map(list, zip(*pieces, strict=True))
        in_fp32 = self._buffer_for(copies)
        torch._foreach_copy_(in_fp32, gradients)
        exp_avgs, exp_avg_sqs, *largest = map(list, zip(*moments, strict=True))
        beta1, beta2 = group["betas"]
        update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        update(
            copies,
            in_fp32,
            exp_avgs,
            exp_avg_sqs,
            largest[0] if largest else [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )
        torch._foreach_copy_(weights, copies)

    def _buffer_for(self, copies: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised fp32 tensors as long as `copies`, in the memory of the previous ones: that is in the cache."""
        numbers = [len(copy) for copy in copies]
        if self._buffer is None or len(self._buffer) < sum(numbers):
            self._buffer, self._buffer_parts = copies[0].new_empty(sum(numbers)), {}
        lengths = tuple(numbers)
        if lengths not in self._buffer_parts:
            self._buffer_parts[lengths] = list(torch.split(self._buffer[: sum(numbers)], numbers))
        return self._buffer_parts[lengths]


class MixedAdamW(MixedAdam, torch.optim.AdamW):
    """The same for AdamW."""

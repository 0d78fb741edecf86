"""Adam and AdamW in mixed precision: the weights that a model computes with are in one type, and what is updated are
copies of them in fp32.

An update reads and writes memory and computes next to nothing. So it is done a piece at a time: a piece's gradients are
turned into fp32, its copies are updated and its weights written while they are still in the processor's cache, and the
gradients of a whole model, or of its largest matrix, never stand in memory in fp32.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trainers.planning.memory import PIECE
from trainers.training.distributed import local


class _Piece(NamedTuple):
    """The same numbers of a weight, its copy and the moments of that, in one dimension; `step` counts those taken."""

    weight: Tensor
    copy: Tensor
    moments: tuple[Tensor, ...]
    step: Tensor


class MixedAdam(torch.optim.Adam):
    """torch's Adam, fused, over copies in fp32. `copied` gives each its weight: a step takes that one's gradient, which
    is gone afterwards, and gives it the result. The state is that of torch's Adam, and so are the numbers.

    State that is to be gone on from has to be there before the first step.
    """

    def __init__(self, copied: Mapping[nn.Parameter, nn.Parameter], arguments: Mapping[str, Any]) -> None:
        """`arguments`: those of torch's Adam, without its choice of an implementation."""
        super().__init__(list(copied), **arguments, fused=True)
        self._copied = copied
        self._most = PIECE[local(next(iter(copied))).device.type]
        self._pieces: dict[nn.Parameter, list[_Piece]] = {}
        self._room: Tensor | None = None
        self._parts: dict[tuple[int, ...], list[Tensor]] = {}
        """Of the room, by their lengths: the same are wanted in every step."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes none
        (group,) = self.param_groups
        waiting: list[tuple[_Piece, Tensor]] = []
        numbers = 0
        copies = [copy for copy in group["params"] if self._copied[copy].grad is not None]
        for copy in copies:
            if copy not in self._pieces:
                self._pieces[copy] = list(self._split(copy))
        if copies:
            torch._foreach_add_([self._pieces[copy][0].step for copy in copies], 1)
        for piece, gradient in self._gradients(copies):
            if waiting and numbers + len(gradient) > self._most:
                self._update(waiting, group)
                waiting, numbers = [], 0
            waiting.append((piece, gradient))
            numbers += len(gradient)
        if waiting:
            self._update(waiting, group)

    def _gradients(self, copies: Iterable[nn.Parameter]) -> Iterator[tuple[_Piece, Tensor]]:
        """Of each piece of `copies`, whose weights lose them."""
        for copy in copies:
            weight, pieces = self._copied[copy], self._pieces[copy]
            gradient = local(cast(Tensor, weight.grad)).reshape(-1)
            weight.grad = None
            yield from zip(pieces, torch.split(gradient, self._most) if len(pieces) > 1 else [gradient], strict=True)

    def _split(self, copy: nn.Parameter) -> Iterator[_Piece]:
        state = self.state[copy]
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.defaults["amsgrad"] else [])]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local(copy).device)
            state.update({name: torch.zeros_like(copy) for name in names})
        flat = [local(one).view(-1) for one in (self._copied[copy], copy, *(state[name] for name in names))]
        for of_weight, of_copy, *of_moments in zip(*(torch.split(one, self._most) for one in flat), strict=True):
            yield _Piece(of_weight, of_copy, tuple(of_moments), state["step"])

    def _update(self, waiting: list[tuple[_Piece, Tensor]], group: Mapping[str, Any]) -> None:
        pieces, gradients = map(list, zip(*waiting, strict=True))
        weights, copies, moments, steps = map(list, zip(*pieces, strict=True))
        in_fp32 = self._room_for(copies)
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

    def _room_for(self, copies: Sequence[Tensor]) -> list[Tensor]:
        """In one piece of memory, that of the last ones: it is in the cache."""
        numbers = [len(copy) for copy in copies]
        if self._room is None or len(self._room) < sum(numbers):
            self._room, self._parts = copies[0].new_empty(sum(numbers)), {}
        lengths = tuple(numbers)
        if lengths not in self._parts:
            self._parts[lengths] = list(torch.split(self._room[: sum(numbers)], numbers))
        return self._parts[lengths]


class MixedAdamW(MixedAdam, torch.optim.AdamW):
    """The same of AdamW."""

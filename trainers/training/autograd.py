"""What torch's types leave out of `torch.autograd.Function`."""

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """What a function's `forward` leaves for its `backward`."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...

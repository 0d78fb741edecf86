"""Types for `torch.autograd.Function` that torch's own annotations lack."""

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The `ctx` of a function: its `forward` saves values in it for its `backward`."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...

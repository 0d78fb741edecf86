"""The feed-forward layer of all families. Its outputs and gradients are bit-identical to torchtune's.

On a CPU, a custom autograd function between the matrix products keeps only gate and value for the backward pass and
applies the activation again there; torch's autograd would keep its result, too. Everything else is computed in place.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainers.models.architecture import Activation
from trainers.training.autograd import Context


class _Activation(NamedTuple):
    of: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], object]
    """Given the gradient of the activation's output and the activation's input, overwrites the former with the gradient
    of the input."""


def _silu_backward_(gradient: Tensor, x: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=gradient)


def _gelu_tanh_backward_(gradient: Tensor, x: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=gradient)


_ACTIVATIONS: dict[Activation, _Activation] = {
    "silu": _Activation(functional.silu, _silu_backward_),
    "gelu_tanh": _Activation(partial(functional.gelu, approximate="tanh"), _gelu_tanh_backward_),
}


class GatedFeedForward(nn.Module):
    """w2(activation(w1(x)) * w3(x)): [..., d] -> [..., d]. Its layers are named as in torchtune's `FeedForward`."""

    def __init__(self, *, w1: nn.Module, w2: nn.Module, w3: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = w1, w2, w3
        self._activation = _ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.w2(_gated(self.w1(x), self.w3(x), self._activation))
        return output


def _gated(gate: Tensor, value: Tensor, activation: _Activation) -> Tensor:
    if gate.device.type == "cpu" and not torch.compiler.is_compiling():
        return _on_cpu(gate, value, activation)
    return activation.of(gate) * value


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: "_OfGated", gate: Tensor, value: Tensor, activation: _Activation) -> Tensor:
        ctx.save_for_backward(gate, value)
        ctx.activation = activation
        return activation.of(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: "_OfGated", d_output: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, value = ctx.saved_tensors
        d_value = ctx.activation.of(gate).mul_(d_output)
        d_gate = d_output * value
        ctx.activation.backward_(d_gate, gate)
        return d_gate, d_value, None


class _OfGated(Context):
    activation: _Activation


_on_cpu: Callable[..., Tensor] = _Gated.apply

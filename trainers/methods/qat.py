"""QAT: full fine-tuning of weights that are to be quantised afterwards.

Each linear layer rounds as the quantised model will: inputs to 8 bits per token, weights to 4 bits in groups of
`groupsize` inputs. The gradient passes the rounding by. What is saved are the weights before rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization.qat.linear import Int8DynActInt4WeightQATLinear

from trainers.methods.full import Full
from trainers.models.decoder import Head
from trainers.planning.plan import Plan


class Qat(Full):
    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        assert plan.quantizer is not None  # noqa: S101  -- as every plan of this method has it
        self.arguments = plan.quantizer.kwargs

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        kind: type[Any] = RoundingHead if name == "output" else Int8DynActInt4WeightQATLinear
        layer: nn.Module = kind(inputs, outputs, bias, precision=torch.get_default_dtype(), **self.arguments)
        return layer


class RoundingHead(Int8DynActInt4WeightQATLinear, Head):  # type: ignore[misc]  # torchao ships no types
    """torchao's layer as an output head: the matrix is rounded once, however many chunks of rows go through it, and
    there may be no rows at all, which torchao can't round: a rank's share of the last step of an epoch can be empty."""

    activation_fake_quantizer: nn.Module
    weight_fake_quantizer: nn.Module

    def forward(self, hidden: Tensor, use: Callable[[Tensor, Tensor], Tensor] = functional.linear) -> Tensor:
        rounded = self.activation_fake_quantizer(hidden) if hidden.numel() else hidden
        return use(rounded, self.weight_fake_quantizer(self.weight))

"""Quantisation-aware training: full fine-tuning of a model that is to be quantised afterwards.

Each linear layer rounds as the quantised model will: its inputs to 8 bits per token, its weights to 4 bits in groups of
`groupsize` inputs. The gradient ignores the rounding (straight-through estimator). Checkpoints have the weights before
rounding.
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
    """torchao's layer as an output head. It rounds the matrix once, however many chunks of rows go through it. It also
    accepts zero rows, which torchao can't round: a rank may have none in the last step of an epoch."""

    activation_fake_quantizer: nn.Module
    weight_fake_quantizer: nn.Module

    def forward(self, hidden: Tensor, use: Callable[[Tensor, Tensor], Tensor] = functional.linear) -> Tensor:
        rounded = self.activation_fake_quantizer(hidden) if hidden.numel() else hidden
        return use(rounded, self.weight_fake_quantizer(self.weight))

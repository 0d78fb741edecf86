"""QAT: full fine-tuning of weights that are to be quantised afterwards.

Each linear layer rounds as the quantised model will: inputs to 8 bits per token, weights to 4 bits in groups of
`groupsize` inputs. The gradient passes the rounding by. What is saved are the weights before rounding.
"""

import torch
from torch import nn
from torchao.quantization.qat.linear import Int8DynActInt4WeightQATLinear

from trainers.methods.full import Full
from trainers.plan import Plan


class Qat(Full):
    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        assert plan.quantizer is not None  # noqa: S101  -- as every plan of this method has it
        self.arguments = plan.quantizer.kwargs

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        layer: nn.Module = Int8DynActInt4WeightQATLinear(
            inputs, outputs, bias, precision=torch.get_default_dtype(), **self.arguments
        )
        return layer

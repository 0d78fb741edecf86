"""RMSNorm, whose outputs are the bits of torchtune's.

On a CPU torch computes it, and its gradients, in a dozen operations, each of which makes a new matrix in float32; two
of these stay for the backward pass. Here they are worked out in place, from the input and a number for each row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchtune.modules import RMSNorm


class FusedRMSNorm(RMSNorm):  # type: ignore[misc]  # torchtune ships no types
    """torchtune's RMSNorm without its cast of the input, which keeps PyTorch from its fused kernel in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps)


class GemmaNorm(nn.Module):
    """RMSNorm that multiplies by (1 + scale), in float32 like transformers'."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1.0 + self.scale.float(), self.eps)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`x` [..., d] divided by the root of its mean square + `eps`, times `scale` [d]; in float32 whatever the types."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _on_cpu(x, scale, eps)
    if scale.dtype != x.dtype:
        return functional.rms_norm(x.float(), scale.shape, scale.float(), eps).type_as(x)
    return functional.rms_norm(x, scale.shape, scale, eps)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x) and g the gradient of n, that of x is (g - n * mean(g * n)) / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:  # noqa: ANN401  -- torch types it too narrowly
        normed = x.to(torch.float32, copy=True)
        inverse = normed.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # of the root mean square, [..., 1]
        ctx.save_for_backward(x, scale, inverse)
        return normed.mul_(inverse).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ANN401
        x, scale, inverse = ctx.saved_tensors
        normed = x.to(torch.float32, copy=True).mul_(inverse)
        d_normed = d_output.to(torch.float32, copy=True)
        products = d_normed * normed
        d_scale = products.flatten(0, -2).sum(0).to(scale.dtype) if ctx.needs_input_grad[1] else None
        scale = scale.float()
        mean = (products @ scale).div_(len(scale))[..., None]
        d_x = d_normed.mul_(scale).addcmul_(normed, mean, value=-1).mul_(inverse)
        return d_x.to(x.dtype), d_scale, None


_on_cpu: Callable[..., Tensor] = _RMSNorm.apply

"""RMSNorm. Its outputs are bit-identical to torchtune's.

On a CPU, torch computes it and its gradients in a dozen operations that each allocate a float32 matrix, of which two
are kept for the backward pass. Here both passes work in place and keep only the input and one number for each row.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchtune.modules import RMSNorm

from trainers.training.autograd import Context


class FusedRMSNorm(RMSNorm):  # type: ignore[misc]  # torchtune ships no types
    """torchtune's RMSNorm without the cast of the input that prevents PyTorch's fused kernel in bfloat16."""

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
    """With r = rms(x) and g the gradient of x / r, the gradient of x is g / r - x * mean(g * x) / r^3."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        normed = x.to(torch.float32, copy=True)
        inverse = normed.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # 1 / root mean square, [..., 1]
        ctx.save_for_backward(x, scale, inverse)
        return normed.mul_(inverse).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale, inverse = ctx.saved_tensors
        wide, d_x = x.float(), d_output.to(torch.float32, copy=True)
        products = d_x * wide
        d_scale = (inverse.flatten() @ products.flatten(0, -2)).to(scale.dtype) if ctx.needs_input_grad[1] else None
        scale = scale.float()
        towards_x = (products @ scale).div_(-len(scale))[..., None] * inverse**3
        d_x.mul_(scale).mul_(inverse).addcmul_(wide, towards_x)
        return d_x.to(x.dtype), d_scale, None


_on_cpu: Callable[..., Tensor] = _RMSNorm.apply

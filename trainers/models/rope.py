"""Rotary position embeddings in the half-split convention of Hugging Face checkpoints.

transformers rotates the pairs (x[i], x[i + d/2]), torchtune and the original Llama code (x[2i], x[2i + 1]). Using the
convention of the checkpoints means that q and k projections are loaded and saved as they are.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainers.models.rope_config import RopeParams
from trainers.training.autograd import Context


class RotaryEmbedding(nn.Module):
    """Rotates queries or keys, shape [b, s, heads, head_dim], by their positions.

    The tables of cosines and sines are not saved and always float32: moving, casting or emptying the module (`to`,
    `to_empty`) computes them again on the new device. Code that materialises a module tensor by tensor (FSDP2) must
    call `rope_init(device)` afterwards.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, params: RopeParams, head_dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.params = params
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.rope_init()

    def rope_init(self, device: torch.device | str | None = None) -> None:
        """Computes the tables, shape [max_seq_len, head_dim / 2], on `device` (None: the current default device)."""
        frequencies = inverse_frequencies(self.params, self.head_dim, device)
        positions = torch.arange(self.max_seq_len, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies)
        self.register_buffer("cos", angles.cos() * self.params.attention_factor, persistent=False)
        self.register_buffer("sin", angles.sin() * self.params.attention_factor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rope_init(self.cos.device)
        return self

    def at(self, length: int, input_pos: Tensor | None = None) -> "Rotation":
        """The rotation for `length` positions: `input_pos`, shape [s] or [b, s]; None: 0, 1, 2, ..."""
        cos = self.cos[:length] if input_pos is None else self.cos[input_pos]
        sin = self.sin[:length] if input_pos is None else self.sin[input_pos]
        return Rotation(cos.unsqueeze(-2), sin.unsqueeze(-2))

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """`input_pos` as in `at`. Returns the shape and dtype of `x`."""
        return self.at(x.shape[1], input_pos)(x)


class Rotation(NamedTuple):
    """A rotation by the angles of some positions, the same for all heads: [s, 1, d / 2] or [b, s, 1, d / 2]."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates queries or keys, shape [b, s, heads, d]. Returns the same shape and dtype."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _rotated_on_cpu(x, self.cos, self.sin)
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = self
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class _Rotated(torch.autograd.Function):
    """Its gradient is the inverse rotation. Autograd would keep twice as much for it, and fill halves of matrices with
    zeros."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x.float(), cos, sin).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_output: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(d_output.float(), cos, -sin).type_as(d_output), None, None


_rotated_on_cpu: Callable[..., Tensor] = _Rotated.apply


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + d/2]) of `x` [..., d], float32. Not differentiable by autograd."""
    output = torch.empty_like(x)
    (first, second), (of_first, of_second) = x.chunk(2, dim=-1), output.chunk(2, dim=-1)
    torch.mul(first, cos, out=of_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=of_second).addcmul_(first, sin)
    return output


def inverse_frequencies(params: RopeParams, head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """Radians per position of each rotated pair, float32, shape [head_dim / 2].

    The formulas, and their order of operations, are those of transformers (`modeling_rope_utils.py`).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    if params.kind == "longrope":
        factors = torch.tensor(params.short_factor, dtype=torch.float32, device=device)
        return 1.0 / (factors * params.theta**exponents)
    frequencies = 1.0 / (params.theta**exponents)
    if params.kind == "linear":
        return frequencies / params.factor
    if params.kind == "llama3":
        return _llama3(params, frequencies)
    return frequencies


def _llama3(params: RopeParams, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths' frequencies are divided by `factor`, short ones' are kept, others interpolated."""
    wavelengths = 2 * math.pi / frequencies
    longest = params.original_context / params.low_freq_factor
    shortest = params.original_context / params.high_freq_factor
    scaled = torch.where(wavelengths > longest, frequencies / params.factor, frequencies)
    smooth = (params.original_context / wavelengths - params.low_freq_factor) / (
        params.high_freq_factor - params.low_freq_factor
    )
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, (1 - smooth) * scaled / params.factor + smooth * scaled, scaled)

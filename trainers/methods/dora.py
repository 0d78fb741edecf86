"""DoRA: LoRA that trains the length of each weight row apart from its direction (https://arxiv.org/abs/2402.09353).

A layer computes m / |W + s·BA| · (W + s·BA) x, where |·| is the norm of each row. A, B and the magnitudes m are
trained.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear

from trainers.methods.lora import Lora
from trainers.models.adapters import MAGNITUDE, untouched_magnitudes
from trainers.models.architecture import Architecture
from trainers.models.decoder import plain_linear
from trainers.models.layout import adapts
from trainers.models.weights import load_weights
from trainers.planning.plan import LoraSpec


class UnscaledBiasDoRALinear(DoRALinear):  # type: ignore[misc]  # torchtune ships no types
    """torchtune's DoRALinear, but the bias isn't scaled, as in PEFT. torchtune scales it with its row."""

    def forward(self, x: Tensor) -> Tensor:
        update = self.scaling * self.lora_b(self.lora_a(self.dropout(x)))
        out: Tensor = self._scale() * (functional.linear(x, self.weight) + update)
        return out if self.bias is None else out + self.bias

    def _scale(self) -> Tensor:
        """m / |W + s·BA| [outputs]. The gradient treats the norm as a constant (section 4.3 of the paper)."""
        with torch.no_grad():
            norm = torch.linalg.norm(self.weight + self.scaling * (self.lora_b.weight @ self.lora_a.weight), dim=1)
        scale: Tensor = self.magnitude / norm
        return scale


class Dora(Lora):
    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        return dora_linear(self.spec, name, inputs, outputs, bias=bias)

    def trains(self, name: str) -> bool:
        return super().trains(name) or name.endswith(MAGNITUDE)

    def weights(
        self,
        decoder: TransformerDecoder,
        arch: Architecture,
        model_dir: Path,
        resume_from: Path | None,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        weights = super().weights(decoder, arch, model_dir, resume_from, dtype)
        return weights if resume_from else weights | initial_magnitudes(decoder, weights, dtype)

    def save(self, directory: Path, trained: Mapping[str, Tensor], arch: Architecture, model_dir: Path) -> None:
        rest = untouched_magnitudes(load_weights(model_dir, arch), trained, arch)
        super().save(directory, {**trained, **rest}, arch, model_dir)


def dora_linear(spec: LoraSpec, name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
    if not adapts(spec, name):
        return plain_linear(name, inputs, outputs, bias=bias)
    return UnscaledBiasDoRALinear(
        inputs, outputs, rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout, use_bias=bias
    )


def initial_magnitudes(model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The initial magnitudes, fp32: the row norms of each adapted layer, whose weights are taken in `dtype`, as in
    training. With them, and B zero, training starts at the base model. They aren't rounded to `dtype`, as in mixed the
    fp32 copies start from them."""
    layers = [name.removesuffix(MAGNITUDE) for name, _ in model.named_parameters() if name.endswith(MAGNITUDE)]
    return {
        layer + MAGNITUDE: torch.linalg.vector_norm(weights[f"{layer}.weight"].to(dtype), dim=1, dtype=torch.float32)
        for layer in layers
    }

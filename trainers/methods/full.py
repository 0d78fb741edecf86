"""Full fine-tuning: trains every parameter. A checkpoint is a model directory."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from trainers.methods.method import Method
from trainers.models.architecture import Architecture
from trainers.models.decoder import plain_linear
from trainers.models.weights import load_weights
from trainers.training.checkpoint import reading
from trainers.training.export import export_model


class Full(Method):
    keeps_base = False

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        return plain_linear(name, inputs, outputs, bias=bias)

    def trains(self, name: str) -> bool:
        return True

    def weights(
        self,
        decoder: TransformerDecoder,
        arch: Architecture,
        model_dir: Path,
        resume_from: Path | None,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        if resume_from is None:
            return load_weights(model_dir, arch)
        with reading(resume_from):
            return load_weights(resume_from, arch)

    def save(self, directory: Path, trained: Mapping[str, Tensor], arch: Architecture, model_dir: Path) -> None:
        export_model(trained, arch, model_dir, directory)

"""What a way of fine-tuning decides; the decoder, the recipe and the checkpoints ask it and know no method by name."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from trainers.models.architecture import Architecture
from trainers.planning.plan import Plan


class Method(ABC):
    """Made once per run, on every rank."""

    keeps_base: bool
    """The model's own weights stay as they are: only adapters are trained, gathered and saved."""

    shards = True
    """FSDP can split the model over the ranks. Otherwise each rank holds all of it, whatever its size."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @abstractmethod
    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        """The linear layer `name` of the decoder (`attn.q_proj`, `mlp.w1`, `output`), under the current default device
        and dtype."""

    @abstractmethod
    def trains(self, name: str) -> bool:
        """Whether the decoder's parameter `name` is trained."""

    @abstractmethod
    def weights(
        self,
        decoder: TransformerDecoder,
        arch: Architecture,
        model_dir: Path,
        resume_from: Path | None,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """A value for every parameter of `decoder` (which is on the meta device), whole and on the CPU: those of
        `model_dir` to begin with, those of the checkpoint directory `resume_from` to go on. Raises
        InfrastructureError `checkpoint_unreadable`."""

    def placed(self, name: str, value: Tensor) -> Tensor:
        """`value`, which is whole and on the device of training, in the form in which the decoder is to hold its
        parameter `name`. Asked for each parameter once, unless the model is sharded."""
        return value

    @abstractmethod
    def save(self, directory: Path, trained: Mapping[str, Tensor], arch: Architecture, model_dir: Path) -> None:
        """Writes into `directory` what loads elsewhere, beside training. `trained` are the trained parameters, whole
        and on the CPU."""

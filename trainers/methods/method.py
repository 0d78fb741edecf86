"""The interface of a fine-tuning method: its layers, the parameters it trains, their initial values, and what it saves.
Decoder, recipe and checkpoints use only this interface.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from trainers.models.architecture import Architecture
from trainers.planning.plan import Plan


class Method(ABC):
    """A fine-tuning method for a plan. Each rank makes one per run."""

    keeps_base: bool
    """Whether the model's own weights are frozen, so that only adapters are trained, gathered and saved."""

    shards = True
    """Whether FSDP can shard the model. If not, each rank holds all of it, whatever its size."""

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
        """A value for every parameter of `decoder` (which is on the meta device), whole and on the CPU: the initial
        ones, from `model_dir`, or those of the checkpoint directory `resume_from`. `dtype` is that of training. Raises
        InfrastructureError `checkpoint_unreadable`."""

    def placed(self, name: str, value: Tensor) -> Tensor:
        """The form in which the decoder holds the parameter `name`, e.g. quantised. `value` is whole and on the device
        of training. Called once for each parameter, unless the model is sharded."""
        return value

    @abstractmethod
    def save(self, directory: Path, trained: Mapping[str, Tensor], arch: Architecture, model_dir: Path) -> None:
        """Writes the trained model to `directory`, in a form that loads elsewhere, while training may go on. `trained`
        are the trained parameters, whole and on the CPU."""

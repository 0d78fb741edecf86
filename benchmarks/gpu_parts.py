"""Components that `benchmarks.gpu` names in torchtune's configs: random weights, and packed documents."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchtune import config as torchtune_config
from torchtune import training
from torchtune.datasets import PackedDataset

from benchmarks.stock_parts import given_out
from trainers.training.collate import IGNORED

documents: Sequence[np.ndarray] = ()
"""Set by `benchmarks.gpu`."""


class RandomWeights:
    """A checkpointer that "loads" random weights, made on `device`, and saves nothing."""

    def __init__(
        self, model: dict[str, Any], device: str, dtype: str, model_type: str, *, should_load_recipe_state: bool
    ) -> None:
        """`model` names torchtune's builder and its arguments. Recipes give the last two arguments to any
        checkpointer."""
        self._model, self._device = OmegaConf.create(model), device
        self._dtype = training.get_dtype(dtype, torch.device(device))

    def load_checkpoint(self) -> dict[str, dict[str, Tensor]]:
        with torch.device("meta"):
            model = torchtune_config.instantiate(self._model)
        weights = {name: self._random(value) for name, value in model.state_dict().items() if ".lora_" not in name}
        return {training.MODEL_KEY: weights}

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 -- whatever the recipe gives
        pass

    def _random(self, like: Tensor) -> Tensor:
        if like.dim() == 1:  # norms
            return torch.ones(like.shape, dtype=self._dtype, device=self._device)
        return torch.empty(like.shape, dtype=self._dtype, device=self._device).normal_(std=0.02)


class _Whole:
    """A dataset of the documents, every token of which is trained on."""

    def __len__(self) -> int:
        return len(documents)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens = documents[index].tolist()
        return {"tokens": tokens, "labels": tokens}


class Packs(PackedDataset):  # type: ignore[misc]  # torchtune ships no types
    """The documents, packed by torchtune. Counts the tokens that are read from it, without padding."""

    def __init__(self, tokenizer: object, max_seq_len: int, *, packed: bool) -> None:
        super().__init__(_Whole(), max_seq_len=max_seq_len)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super().__getitem__(index)
        given_out(int((found["labels"] != IGNORED).sum()))
        return found

"""What the stock recipes are given through their configs: our prepared rows, a log of every step, a constant rate.

torchtune imports this by the dotted names in the configs that `tests.parity.stock` writes.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from torchtune.datasets import PackedDataset

from trainers.collate import IGNORED
from trainers.data.dataset import TokenisedDataset


class Padding:
    """Stands where a recipe wants a tokenizer, of which it only asks what to pad with. Rows are tokenised already."""

    pad_id = 0


class PreparedRows(Dataset[dict[str, list[int]]]):
    """The rows of a prepared data set as torchtune's datasets hand them out: labels[j] belongs to tokens[j]."""

    def __init__(self, directory: Path) -> None:
        self._rows = TokenisedDataset(directory)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens, trained = self._rows[index]
        labels = [int(token) if counts else IGNORED for token, counts in zip(tokens, trained, strict=True)]
        return {"tokens": tokens.tolist(), "labels": labels}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))


def prepared_rows(
    _tokenizer: Padding, directory: str, packed: bool, max_seq_len: int | None
) -> PreparedRows | PackedDataset:
    """The recipes read `packed` too: it chooses how they collate."""
    rows = PreparedRows(Path(directory))
    return PackedDataset(rows, max_seq_len=max_seq_len) if packed else rows


class StepLog:
    """A metric logger that keeps every figure to the last bit. Its file, a list of steps in JSON, is there when the run
    is over."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        self._steps: list[dict[str, float]] = []

    def log_config(self, config: Any) -> None:
        pass

    def log_dict(self, payload: Mapping[str, float | torch.Tensor], step: int) -> None:
        self._steps.append({"step": step} | {name: float(value) for name, value in payload.items()})

    def close(self) -> None:
        unfinished = self._file.with_suffix(".part")
        unfinished.write_text(json.dumps(self._steps), encoding="utf-8")
        unfinished.replace(self._file)


def constant_rate(optimizer: torch.optim.Optimizer, num_training_steps: int, last_epoch: int) -> LambdaLR:
    """For the LoRA recipes, which can't do without a schedule."""
    return LambdaLR(optimizer, lambda _: 1.0, last_epoch)

"""Components (`_component_`) for torchtune's configs: rows, a clock, a constant learning rate, a loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

on_step: Callable[[int, float], None] = print
"""Called by a Clock at the end of each step with its tokens and its loss. To be set before the recipe runs."""
_pending_tokens = 0


class Padding:
    """Takes the place of a tokenizer. The rows are already tokenised, so a recipe only needs its padding token."""

    pad_id = 0


def rows(_tokenizer: Padding, file: str, *, packed: bool = False, max_seq_len: int | None = None) -> Any:  # noqa: ANN401 -- untyped
    """The dataset of the rows in `file`, packed by torchtune if `packed`. (The recipes read `packed`, too, to choose
    their collate function.)"""
    if not packed:
        return Rows(file)
    from torchtune.datasets import PackedDataset

    return PackedDataset(Rows(file), max_seq_len=max_seq_len)


class Rows:
    """A map-style dataset of tokenised rows: JSON lines of `input_ids` and `labels`, where labels[j] belongs to
    input_ids[j]. It counts the tokens read by this rank; the recipes' loaders read a row only in its step."""

    def __init__(self, file: str) -> None:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        self._rows = [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self._rows[index]
        given_out(len(row["input_ids"]))
        return {"tokens": row["input_ids"], "labels": row["labels"]}


def given_out(tokens: int) -> None:
    """To be called by a dataset when a row is read: adds its tokens to those of the step, for the Clock."""
    global _pending_tokens
    _pending_tokens += tokens


class Clock:
    """A metric logger, which the recipes call at the end of every step."""

    def log_config(self, config: object) -> None:
        pass

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        global _pending_tokens
        tokens, _pending_tokens = _pending_tokens, 0
        on_step(tokens, float(payload["loss"]))

    def close(self) -> None:
        pass


def constant(optimizer: Optimizer, num_training_steps: int, last_epoch: int) -> LambdaLR:
    """A schedule that keeps the learning rate constant. The LoRA recipes require a schedule."""
    return LambdaLR(optimizer, lambda _: 1.0, last_epoch)


class ExactCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy in float64. In float32 torch's is exact only to 1e-5 with 49,152 tokens, so that losses differ by
    1e-4 after 200 steps."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.double(), labels, ignore_index=self.ignore_index).float()

"""Parts that torchtune's recipes take by name (`_component_`): rows, a clock, a constant learning rate, a loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

on_step: Callable[[int, float], None] = print
"""Set by who runs a recipe with a Clock: gets the tokens of each step, and its loss, as it ends."""
_pending_tokens = 0


class Padding:
    """Stands where a recipe wants a tokenizer, of which it only asks what to pad with. Rows are tokenised already."""

    pad_id = 0


def rows(_tokenizer: Padding, file: str, *, packed: bool = False, max_seq_len: int | None = None) -> Any:  # noqa: ANN401 -- untyped
    """The rows of `file`, packed by torchtune if they are to be. (The recipes read `packed`, too, to choose how they
    collate.)"""
    if not packed:
        return Rows(file)
    from torchtune.datasets import PackedDataset

    return PackedDataset(Rows(file), max_seq_len=max_seq_len)


class Rows:
    """A map-style dataset of tokenised rows, JSON lines of `input_ids` and `labels`; labels[j] belongs to input_ids[j].
    Counts the tokens it gives out, on this rank: the recipes' loaders read no row before its step."""

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
    """A dataset tells the Clock what the step that comes is made of."""
    global _pending_tokens
    _pending_tokens += tokens


class Clock:
    """A metric logger: the recipes call it at the end of every step."""

    def log_config(self, config: object) -> None:
        pass

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        global _pending_tokens
        tokens, _pending_tokens = _pending_tokens, 0
        on_step(tokens, float(payload["loss"]))

    def close(self) -> None:
        pass


def constant(optimizer: Optimizer, num_training_steps: int, last_epoch: int) -> LambdaLR:
    """A scheduler that leaves the learning rate as it is; the LoRA recipes insist on one."""
    return LambdaLR(optimizer, lambda _: 1.0, last_epoch)


class ExactCrossEntropy(nn.CrossEntropyLoss):
    """In float64. In float32 torch's adds up 49,152 words to within 1e-5 only: over 200 steps losses part by 1e-4."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.double(), labels, ignore_index=self.ignore_index).float()

"""Parts that torchtune's recipes take by name (`_component_`): our rows, a clock, a constant learning rate."""

import json
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.contender import Recording

recording: Recording | None = None
"""Set by the launcher; steps go to it."""
_pending_tokens = 0


class NoTokenizer:
    """The recipes ask a tokenizer for its padding id and hand it to the dataset, which has tokens already."""

    pad_id = 0


class Rows:
    """A map-style dataset of tokenised rows. Counts the tokens it gives out, on this rank: the recipes' loaders read no
    row before its step."""

    def __init__(self, tokenizer: NoTokenizer, file: str) -> None:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        self._rows = [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        global _pending_tokens
        row = self._rows[index]
        _pending_tokens += len(row["input_ids"])
        return {"tokens": row["input_ids"], "labels": row["labels"]}


class Clock:
    """A metric logger: the recipes call it at the end of every step."""

    def log_config(self, config: Any) -> None:  # noqa: ANN401 -- a DictConfig
        pass

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        global _pending_tokens
        assert recording is not None
        tokens, _pending_tokens = _pending_tokens, 0
        recording.step(tokens, float(payload["loss"]))

    def close(self) -> None:
        pass


def constant(optimizer: Optimizer, num_training_steps: int, last_epoch: int) -> LambdaLR:
    """A scheduler that leaves the learning rate as it is; the LoRA recipes insist on one."""
    return LambdaLR(optimizer, lambda _: 1.0)

"""Plans, rows and a load, for tests of memory estimates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from events.config import Config
from trainers.planning.memory import Load
from trainers.planning.plan import Plan, make_plan

FULL = {"finetuning_type": "full", "enable_activation_checkpointing": False}
LORA = {"finetuning_type": "lora", "lora_rank": 8}
ROW, ROWS = 64, 4
LOAD = Load(positions=1600, trained=800, segment=400)


class Rows:
    """Rows of random tokens, of which the second half is trained."""

    def __init__(self, lengths: Sequence[int] = (ROW,) * ROWS) -> None:
        self.lengths = np.array(lengths)
        self.trained = self.lengths // 2

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        length = self.lengths[index]
        tokens = np.random.default_rng(index).integers(0, 500, length)
        return tokens, np.arange(length) >= length // 2


def plan_for(model: Path, custom: dict[str, Any], **extras: Any) -> Plan:
    options = {"custom_training_options": custom, "extras": {"dtype": "fp32", **extras}}
    return make_plan(Config.model_validate({"model": str(model), "data": "d", "fine_tuning_options": options}))

"""Plans, rows and a load, for tests of how much memory they take."""

from pathlib import Path
from typing import Any

import numpy as np

from events.config import Config
from trainers.load import Load
from trainers.plan import Plan, make_plan

FULL = {"finetuning_type": "full", "enable_activation_checkpointing": False}
LORA = {"finetuning_type": "lora", "lora_rank": 8}
ROW, ROWS = 64, 4
LOAD = Load(steps=1, items=8, positions=1600, trained=800, segment=400)


class Rows:
    """Rows of random tokens, of which the second half is trained."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.random.default_rng(index).integers(0, 500, ROW)
        return tokens, np.arange(ROW) >= ROW // 2

    @property
    def lengths(self) -> np.ndarray:
        return np.full(ROWS, ROW)

    @property
    def trained(self) -> np.ndarray:
        return np.full(ROWS, ROW // 2)


def plan_for(model: Path, custom: dict[str, Any], **extras: Any) -> Plan:
    options = {"custom_training_options": custom, "extras": {"dtype": "fp32", **extras}}
    return make_plan(Config.model_validate({"model": str(model), "data": "d", "fine_tuning_options": options}))

"""The metric logger that the configs of the stock recipes name."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


class StepLog:
    """Records every number exactly. Its file, a JSON list of steps, appears when the run is over."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        self._steps: list[dict[str, float]] = []

    def log_config(self, config: object) -> None:
        pass

    def log_dict(self, payload: Mapping[str, float | Tensor], step: int) -> None:
        self._steps.append({"step": step} | {name: float(value) for name, value in payload.items()})

    def close(self) -> None:
        unfinished = self._file.with_suffix(".part")
        unfinished.write_text(json.dumps(self._steps), encoding="utf-8")
        unfinished.replace(self._file)

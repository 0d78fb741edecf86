"""A tiny random model and a few rows: training takes little time with them, so the service's own share shows."""

import json
from pathlib import Path
from typing import Any

from tests.tiny_models import make_tiny_model


def make_material(folder: Path, rows: int) -> tuple[Path, Path]:
    """Makes a model directory and a data file in `folder`; their paths."""
    folder.mkdir(exist_ok=True)
    data = folder / "rows.jsonl"
    lines = (
        json.dumps(
            {
                "dialog": [
                    {"role": "user", "content": f"What comes after {number}?"},
                    {"role": "assistant", "content": f"After {number} comes {number + 1}."},
                ]
            }
        )
        for number in range(rows)
    )
    data.write_text("".join(f"{line}\n" for line in lines))
    return make_tiny_model(folder / "model"), data


def job(model: Path, data: Path, **options: Any) -> dict[str, Any]:  # noqa: ANN401 -- any JSON value
    """A request for a LoRA job of one worker; `options` are fine_tuning_options."""
    return {"model": str(model), "data": str(data), "fine_tuning_options": {"batch_size": 4} | options}

"""The reference model of DPO: the log-probability of each row under the initial model, computed once and kept on disk.

No second model is needed. Before the first step the model being trained is the initial model (a new adapter changes
nothing), and one pass over the data with it gives one number for each row. They are kept in the job's directory, so
that a resumed run, whose weights have changed, uses the same numbers.
"""

import logging
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from events.disk import sync_path
from trainers.data.dataset import TokenisedDataset
from trainers.errors import InfrastructureError, storage_away
from trainers.planning.plan import REFERENCE
from trainers.training.batches import evaluation_batches
from trainers.training.collate import collate
from trainers.training.distributed import Ranks
from trainers.training.training_model import TrainingModel

_PROGRESS_S = 10.0
_log = logging.getLogger("tunewright.train")


def reference_of(
    model: TrainingModel,
    data: dict[str, TokenisedDataset],
    batch_size: int,
    ranks: Ranks,
    output_dir: Path,
    *,
    trained: bool,
) -> dict[str, Tensor]:
    """For each dataset of `data`: the log-probability of each row's trained tokens under the initial model [rows],
    float32, the same bits on every rank. Every rank has to call it.

    They are read from `output_dir`. If they aren't there, they are computed with `model` and written there; but if
    `model` has been `trained`, InfrastructureError `reference_missing` is raised.
    """
    file = output_dir / REFERENCE
    kept = _kept(file) if ranks.first else {}
    complete = all(name in kept and len(kept[name]) == len(rows) for name, rows in data.items())
    found = ranks.sum([ranks.first and complete])[0] == 1
    if not found and trained:
        message = f"{file} is gone or damaged; it had the initial model's log-probabilities, which DPO compares with."
        raise InfrastructureError("reference_missing", message, suggestion="submit the job again")
    if found:  # read by rank 0 only: a new file may not be visible on other nodes yet
        return {
            name: _shared(kept[name] if ranks.first else torch.zeros(len(rows)), ranks) for name, rows in data.items()
        }
    reference = {name: _measure(model, rows, name, batch_size, ranks) for name, rows in data.items()}
    if ranks.first:
        output_dir.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.draft")
        save_file(reference, draft)
        sync_path(draft)
        draft.rename(file)
        sync_path(output_dir)
    return reference


def _kept(file: Path) -> dict[str, Tensor]:
    """The contents of the file; empty if it doesn't exist or is damaged."""
    try:
        return load_file(file) if file.exists() else {}
    except SafetensorError as error:
        if storage_away(error):
            raise
        return {}


@torch.no_grad()
def _measure(model: TrainingModel, data: TokenisedDataset, name: str, batch_size: int, ranks: Ranks) -> Tensor:
    pairs, began = len(data) // 2, time.monotonic()
    if ranks.first:
        _log.info("reference model: measuring %s pairs of the %s data", f"{pairs:,}", name)
    said = began
    model.eval()
    logps = torch.zeros(len(data), dtype=torch.float32, device=ranks.device)
    no_reference = torch.zeros(len(data))  # only the loss depends on it
    batches = evaluation_batches(data.lengths, batch_size, ranks.rank, ranks.world, pairs=True)
    for number, share in enumerate(batches):
        batch = collate(data, share, reference=no_reference)
        rows = torch.tensor([int(row) for item in share for row in item], dtype=torch.int64, device=ranks.device)
        logps[rows] = model(batch.to(ranks.device, model.computed_in)).logps
        if ranks.first and time.monotonic() - said >= _PROGRESS_S:
            said = time.monotonic()
            done = (number + 1) / len(batches)
            _log.info("reference model: %.0f %% of the %s data after %.0f s", 100 * done, name, said - began)
    model.train()
    if ranks.first:
        _log.info("reference model: done with the %s data in %.1f s", name, time.monotonic() - began)
    return _shared(logps, ranks)


def _shared(values: Tensor, ranks: Ranks) -> Tensor:
    """The ranks' values added up, on the CPU. Each row has a value on one rank and 0 on the others, so nothing is
    rounded."""
    return ranks.sum_(values.to(ranks.device)).cpu()

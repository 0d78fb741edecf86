"""Checkpoints: models that load anywhere, complete as soon as they can be seen, and what a run needs to go on exactly.

`checkpoints/step-00000040/` is a Hugging Face model directory (full) or holds `merged/` and `adapter/` (LoRA). Its
`training_state/` stays until a newer checkpoint is recorded. Everything is written under a hidden temporary name,
flushed to disk and renamed; a crash leaves the earlier checkpoints as they were. Only safetensors and JSON.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainers.batches import Progress
from trainers.data.chat import template_to_save
from trainers.distributed import Ranks, like, whole
from trainers.errors import InfrastructureError
from trainers.models.adapters import load_peft_adapter, merge_lora, save_peft_adapter
from trainers.models.architecture import Architecture
from trainers.models.export_files import write_text
from trainers.models.weights import load_weights, save_hf_model
from trainers.plan import LoraSpec, Plan

STATE = "training_state"
_VERSION = 1
_log = logging.getLogger("tunewright.train")

NamedParameters = Mapping[str, nn.Parameter]


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    output_dir: Path,
    plan: Plan,
    arch: Architecture,
    model_dir: Path,
    parameters: NamedParameters,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    ranks: Ranks,
) -> Path:
    """Writes the checkpoint of `progress` and returns its directory. Every rank has to call it; rank 0 writes.

    `parameters` are the trained ones: for LoRA the frozen base is not gathered but read from `model_dir` again.
    """
    path = checkpoint_path(output_dir, progress.step)
    weights = _gathered(dict(parameters), ranks)
    moments = _gathered(dict(_optimizer_tensors(parameters, optimizer)), ranks)
    if ranks.first:
        with _appearing(path) as draft:
            if plan.lora:
                _save_lora(draft, weights, arch, plan, plan.lora, model_dir)
            else:
                _save_model(draft, weights, arch, model_dir)
            _save_state(draft / STATE, moments, progress)
    ranks.barrier()
    return path


def load_progress(checkpoint: Path) -> Progress:
    """Where the run stood at `checkpoint`. Raises InfrastructureError `checkpoint_unreadable`."""
    try:
        state = json.loads((checkpoint / STATE / "state.json").read_text(encoding="utf-8"))
        return Progress(**state["progress"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InfrastructureError(
            "checkpoint_unreadable", f"can't resume from {checkpoint}: {type(error).__name__}: {error}"
        ) from None


def load_adapter(checkpoint: Path, arch: Architecture, lora: LoraSpec) -> dict[str, Tensor]:
    return load_peft_adapter(checkpoint / "adapter", arch, lora)


def load_optimizer(checkpoint: Path, parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer the state it had. Every rank has to call it; any number of ranks may have saved it."""
    fused = bool(optimizer.param_groups[0].get("fused"))
    with safe_open(checkpoint / STATE / "optimizer.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  -- not a dict
            attribute, _, name = key.partition("/")
            value, parameter = file.get_tensor(key), parameters[name]
            if value.shape == parameter.shape:
                value = like(value.clone(), parameter)
            elif fused:
                value = value.to(parameter.device)
            optimizer.state[parameter][attribute] = value


def drop_older_states(output_dir: Path, step: int) -> None:
    """Deletes what only resuming needs from the checkpoints before `step`, and the drafts of runs that crashed."""
    for path in (output_dir / "checkpoints").iterdir():
        if path.name.startswith("."):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name < checkpoint_path(output_dir, step).name:
            shutil.rmtree(path / STATE, ignore_errors=True)


def _gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The full tensors on rank 0, one after the other; nothing on the other ranks."""
    full = {}
    for name, tensor in tensors.items():
        value = whole(tensor, ranks.device)
        if ranks.first:
            full[name] = value
    return full


def _optimizer_tensors(parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        for attribute, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{attribute}/{name}", value


def _save_lora(
    draft: Path, adapter: dict[str, Tensor], arch: Architecture, plan: Plan, lora: LoraSpec, model_dir: Path
) -> None:
    save_peft_adapter(adapter, arch, lora, plan.model, draft / "adapter")
    _save_model(draft / "merged", merge_lora(load_weights(model_dir, arch), adapter, lora), arch, model_dir)


def _save_model(out_dir: Path, weights: dict[str, Tensor], arch: Architecture, model_dir: Path) -> None:
    """A model directory with everything inference needs: where the model brings no chat template, ours too."""
    save_hf_model(weights, arch, model_dir, out_dir)
    template = template_to_save(model_dir)
    if template is not None:
        write_text(template, out_dir / "chat_template.jinja")


def _save_state(state_dir: Path, moments: dict[str, Tensor], progress: Progress) -> None:
    state_dir.mkdir()
    save_file(moments, state_dir / "optimizer.safetensors")
    state: dict[str, Any] = {"version": _VERSION, "progress": asdict(progress)}
    (state_dir / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A directory to write into that becomes `path`, flushed to disk, when the block ends without an error.

    An older `path` (a run that went on from an earlier checkpoint comes by again) gives way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for entry in [*draft.rglob("*"), draft]:
        _flush(entry)
    if path.exists():
        old = path.parent / f".{path.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    draft.rename(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

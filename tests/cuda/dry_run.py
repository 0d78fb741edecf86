"""Programs that the tests run on the stand-in, each in a process of its own: `python -m tests.cuda.dry_run NAME JSON`.

Kernels compute nothing there, so every number is whatever was in memory. Checks of numbers are patched away here.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from tests.tiny_models import make_tiny_model
from tests.trainers.recipe_support import Case, make_plan_for, random_pairs, random_rows, write_rows
from trainers.data.dataset import TokenisedDataset
from trainers.models.architecture import inspect_model_dir
from trainers.models.attention import Rules, _flex_works, block_mask, flex_attend
from trainers.planning.memory import memory_of
from trainers.planning.plan import ComponentSpec, LoraSpec
from trainers.training import recipe
from trainers.training.collate import Layout, Segment
from trainers.training.distributed import Ranks
from trainers.training.load import load_of
from trainers.training.recipe import training_step

COMPILING = 3
"""The first steps, in which code is compiled."""
WIDTH = 2048
PATCH = pytest.MonkeyPatch()
"""Never undone, as the process ends."""
ROW = 512
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": ROW,
    "torch_dtype": "bfloat16",
}


def train(family: str, method: str, changes: dict[str, Any], *, pairs: bool = False, **sizes: Any) -> list[list[str]]:
    """Trains, stops at a checkpoint and resumes from it; the names of all checkpoints of both runs. Fails if a step
    waits for the device."""
    if "lora" in changes:
        changes["lora"] = LoraSpec(**changes["lora"])
    if "optimizer" in changes:
        changes["optimizer"] = ComponentSpec(component=changes["optimizer"])
    _ignore_values()
    if method != "qlora":  # its checkpoints read weights from the device, in another thread, during steps
        PATCH.setattr(recipe, "training_step", _not_waiting(training_step))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = make_tiny_model(scratch / "model", family, **sizes)
        rows = write_rows(scratch / "rows", random_pairs(10) if pairs else random_rows(20))
        valid = None if pairs else write_rows(scratch / "valid", random_rows(5, seed=1))
        plan = make_plan_for(method, **({"dtype": "mixed"} | changes))
        part = Case(plan, model, rows, scratch / "part", valid, stop_at=4).run()
        rest = Case(plan, model, rows, scratch / "rest", valid, resume_from=part.checkpoints[-1].path).run()
        return [[saved.path.name for saved in run.checkpoints] for run in (part, rest)]


def memory(method: str, changes: dict[str, Any]) -> dict[str, int]:
    """Trains a model that isn't tiny: the peak that torch's allocator has handed out, with checkpoints, and the
    estimate; both in bytes."""
    _ignore_values()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = make_tiny_model(scratch / "model", **SIZES)
        arch = inspect_model_dir(model)
        mask = [i >= ROW // 2 for i in range(ROW)]
        rows = write_rows(scratch / "rows", [(list(range(start, start + ROW)), mask) for start in range(8)])
        plan = make_plan_for(method, **({"dtype": "mixed", "batch_size": 4, "save_every_n_steps": 1} | changes))
        estimated = memory_of(plan, arch, load_of(plan, arch, TokenisedDataset(rows)), "cuda")
        Case(plan, model, rows, scratch / "run").run()
        return {"counted": torch.cuda.max_memory_allocated(), "estimated": estimated.peak_bytes}


def flex(head_dim: int, dtype: str, window: int | None, softcap: float | None) -> dict[str, Any]:
    """Compiles FlexAttention and its gradient for such heads: whether the recipe would use it (`used`), and the bytes
    of shared memory that its largest kernel takes (`taken`) and that the GPU has (`there`)."""
    device, kind = torch.device("cuda", 0), getattr(torch, dtype)
    taken = _shared_memory_of_what_is_compiled()
    q, k, v = (
        torch.empty(1, WIDTH, heads, head_dim, device=device, dtype=kind, requires_grad=True) for heads in (4, 2, 2)
    )
    ends = torch.full((1, WIDTH), WIDTH, device=device)
    segments = (Segment(0, 700), Segment(700, 1000, ((0, 700),)), Segment(1000, WIDTH))
    layout = Layout(segments, torch.arange(WIDTH, device=device)[None], ends)
    rules = Rules(window, head_dim**-0.5, softcap, 0.0)
    try:
        torch.autograd.backward(flex_attend(q, k, v, block_mask(WIDTH, window, device, layout), rules).sum())
    except InductorError as error:
        if "out of resource" not in str(error):
            raise
    properties: Any = torch.cuda.get_device_properties(device)  # torch's types lack the field
    there = properties.shared_memory_per_block_optin
    return {"used": _flex_works(device, head_dim, kind), "taken": max(taken), "there": there}


def _ignore_values() -> None:
    add_up = Ranks.sum_

    def counts_of_one(ranks: Ranks, tensor: Tensor) -> Tensor:
        """Ones instead of the counts, by which an evaluation divides."""
        return torch.ones_like(tensor, device="cpu") if tensor.ndim else add_up(ranks, tensor)

    PATCH.setattr(recipe, "_check_weights", lambda *_: None)
    PATCH.setattr(recipe, "_check_finite", lambda *_: None)
    PATCH.setattr(Ranks, "sum_", counts_of_one)


def _not_waiting(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, but torch raises if one of its operations waits for the device, once code is compiled."""
    taken = 0

    def checked(*arguments: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        torch.cuda.set_sync_debug_mode("error" if taken > COMPILING else "default")
        try:
            return step(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return checked


def _shared_memory_of_what_is_compiled() -> list[int]:
    found: list[int] = []
    launch: Callable[[CachingAutotuner], None] = CachingAutotuner._make_launchers

    def noting(tuner: CachingAutotuner) -> None:
        found.extend(result.kernel.shared for result in tuner.compile_results)
        launch(tuner)

    PATCH.setattr(CachingAutotuner, "_make_launchers", noting)
    return found


if __name__ == "__main__":
    programs: dict[str, Callable[..., object]] = {"train": train, "flex": flex, "memory": memory}
    answer = programs[sys.argv[1]](**json.loads(sys.argv[2]))
    sys.stdout.write(json.dumps(answer) + "\n")

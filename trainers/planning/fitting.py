"""Checks whether a job fits the memory of its workers, and finds changes that would make it fit.

Three checks, each more exact than the one before: weights and optimizer alone, when a request comes in (`states_fit`);
an upper bound from the lengths of the rows, once they are tokenised (`surely_fits`, `recomputing_if_needed`); and the
heaviest micro-batch, if that bound is too high (`check_memory`).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainers.errors import CapacityError, Problem, UserError
from trainers.models.architecture import Architecture
from trainers.planning.components import shardable
from trainers.planning.memory import Load, memory_of, states_of
from trainers.planning.plan import LoraSpec, Plan
from trainers.planning.precision import Device
from trainers.planning.suitability import check_suitable, longest_row

MARGIN = 1.25
"""A job is refused only if the estimate exceeds the available memory by this factor, which is more than the estimate
was ever off by."""
_LEAST = Load(1, 1, 1)
"""The smallest load: a plan that doesn't fit with this one fits with none."""
_STATES_ALONE = "for weights and optimizer alone"


def states_fit(plan: Plan, arch: Architecture, worker_bytes: int) -> Problem | None:
    """The problem of a request for CPUs whose weights and optimizer alone exceed the memory of a worker by more than
    `MARGIN`, else None."""
    needed = states_of(plan, arch, "cpu", worker_bytes)
    if needed <= MARGIN * worker_bytes:
        return None
    peak = _peak_on_cpu(arch, _LEAST, worker_bytes)
    error = _does_not_fit(plan, arch, "cpu", needed, worker_bytes, _STATES_ALONE, peak).error
    return Problem(error.param, error.message, error.code)


def check_states(plan: Plan, arch: Architecture, worker_bytes: int) -> None:
    """Raises CapacityError `does_not_fit` if weights and optimizer alone exceed the memory of a worker's GPU."""

    def states(plan: Plan, _share: float = 1) -> int:
        return states_of(plan, arch, "cuda", worker_bytes)

    if states(plan) > worker_bytes:
        raise _does_not_fit(plan, arch, "cuda", states(plan), worker_bytes, _STATES_ALONE, states)


def surely_fits(plan: Plan, arch: Architecture, lengths: NDArray[np.int64], worker_bytes: int) -> bool:
    """Whether `check_memory` passes for any batches made of rows of these `lengths`. If not, `trainers.training.load`
    can tell the actual load; but that imports torch, which takes seconds."""
    return _at_most(plan, arch, lengths, worker_bytes) <= MARGIN * worker_bytes


def recomputing_if_needed(plan: Plan, arch: Architecture, lengths: NDArray[np.int64], share: int | None) -> Plan:
    """The plan without activation checkpointing, if without it any batches of rows of these `lengths` fit a worker's
    `share` of its node's memory (bytes), with the `MARGIN` to spare. Else, or if `share` is None (on GPUs), the plan
    unchanged."""
    if not plan.enable_activation_checkpointing or share is None:
        return plan
    keeping = plan.model_copy(update={"enable_activation_checkpointing": False})
    return keeping if MARGIN * _at_most(keeping, arch, lengths, share) <= share else plan


def check_memory(plan: Plan, arch: Architecture, load: Load, worker_bytes: int) -> None:
    """Raises CapacityError `does_not_fit` if a job on CPUs exceeds the memory of a worker by more than `MARGIN`."""
    peak = _peak_on_cpu(arch, load, worker_bytes)
    if peak(plan, 1) > MARGIN * worker_bytes:
        raise _does_not_fit(plan, arch, "cpu", peak(plan, 1), worker_bytes, "at its peak", peak)


def _at_most(plan: Plan, arch: Architecture, lengths: NDArray[np.int64], worker_bytes: int) -> int:
    """An upper bound of the peak in bytes: the longest rows in one micro-batch, with no shared beginnings."""
    longest = int(lengths.max())
    if plan.packed:
        positions = plan.batch_size * (plan.max_seq_len or longest)
    else:
        rows = plan.batch_size * (2 if plan.pairs else 1)
        positions = int(np.sort(lengths)[-rows:].sum())
    return memory_of(plan, arch, Load(positions, positions, longest), "cpu", worker_bytes).peak_bytes


_Needed = Callable[[Plan, float], int]
"""Bytes that a worker of a plan needs if its micro-batches are scaled down to a share of their tokens."""


def _peak_on_cpu(arch: Architecture, load: Load, worker_bytes: int) -> _Needed:
    def peak(plan: Plan, share: float) -> int:
        left = Load(max(1, int(load.positions * share)), max(1, int(load.trained * share)), load.segment)
        return memory_of(plan, arch, left, "cpu", worker_bytes).peak_bytes

    return peak


def _does_not_fit(
    plan: Plan, arch: Architecture, device: Device, needed: int, worker_bytes: int, when: str, needed_by: _Needed
) -> CapacityError:
    """The error for a plan whose workers need `needed` bytes. Its suggestion lists changes that each make the plan fit:
    of each kind, the one that costs least."""
    enough: dict[str, str] = {}
    for change in _changes(plan, arch, device):
        if change.kind not in enough and needed_by(change.plan, change.share) <= worker_bytes:
            enough[change.kind] = change.advice
    return CapacityError(
        "does_not_fit",
        f"a worker needs about {_gib(needed)} of memory {when}, and can have {_gib(worker_bytes)} at most",
        param="fine_tuning_options",
        suggestion="; or ".join(enough.values() or ["take a smaller model, or larger nodes"]),
    )


class _Change(NamedTuple):
    """A change to a plan, the changed plan, and the share of the tokens of a micro-batch that is left."""

    kind: str
    advice: str
    plan: Plan
    share: float = 1


def _changes(plan: Plan, arch: Architecture, device: Device) -> Iterator[_Change]:
    """Possible changes; those of one kind in the order of what they cost."""
    recomputing: dict[str, Any] = {"enable_activation_checkpointing": True}
    if not plan.enable_activation_checkpointing:
        yield _Change("recompute", "set enable_activation_checkpointing", plan.model_copy(update=recomputing))
    if plan.batch_size > 1:
        changed = plan.model_copy(
            update={"batch_size": 1, "gradient_accumulation_steps": plan.gradient_accumulation_steps * plan.batch_size}
        )
        yield _Change("rows", "set batch_size 1 and gradient_accumulation_steps instead", changed, 1 / plan.batch_size)
    now = longest_row(plan, arch)
    if now >= 256:
        changed = plan.model_copy(update={"max_seq_len": now // 4})
        yield _Change("length", f"set max_seq_len to {now // 4} (it is {now})", changed, 1 / 4)
    if plan.lora is None:
        lora = plan.model_copy(update={"method": "lora", "lora": LoraSpec(), "quantizer": None} | _DEFAULTS_OF_LORA)
        yield _Change("method", "train with LoRA", lora)
        yield _Change(
            "method", "train with LoRA and enable_activation_checkpointing", lora.model_copy(update=recomputing)
        )
        quantised = lora.model_copy(update={"method": "qlora"} | recomputing)
        advice = "train with LoRA, quantize_base and enable_activation_checkpointing"
    else:
        quantised, advice = plan.model_copy(update={"method": "qlora"}), "set quantize_base"
    if plan.method in ("full", "qat", "lora") and _can_be_quantised(quantised, arch):
        yield _Change("method", advice, quantised)
    if plan.dtype != "bf16":
        yield _Change("dtype", "set dtype to bf16", plan.model_copy(update={"dtype": "bf16"}))
    if plan.method != "qlora" and shardable(plan.optimizer.component):
        for factor in (2, 4, 8):
            workers = plan.workers * factor
            changed = plan.model_copy(update={"nproc_per_node": 1, "nnodes": workers, "fsdp_cpu_offload": False})
            apart = ", each on a node of its own" if device == "cpu" else ""
            yield _Change("workers", f"use {workers} workers{apart}", changed)


_DEFAULTS_OF_LORA = {
    "enable_activation_checkpointing": False,
    "memory_efficient_fsdp_wrap": False,
    "fsdp_cpu_offload": False,
}


def _can_be_quantised(quantised: Plan, arch: Architecture) -> bool:
    try:
        check_suitable(quantised, arch)
    except UserError:
        return False
    return not (quantised.memory_efficient_fsdp_wrap or quantised.fsdp_cpu_offload)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"

"""Whether a job fits the memory of its workers, and what to change about it where it doesn't.

Three looks, each closer than the last: at weights and optimizer alone as a request comes in (`states_fit`), at the
lengths of the rows once they are tokenised (`surely_fits`, `recomputing_if_needed`), and at the heaviest micro-batch
where that leaves a doubt (`check_memory`).
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
"""A job is refused only where the estimate exceeds the memory there is by this factor: more than it was ever off by."""


_LEAST = Load(1, 1, 1)
"""What doesn't fit with this fits with no load."""
_STATES_ALONE = "for weights and optimizer alone"


def states_fit(plan: Plan, arch: Architecture, worker_bytes: int) -> Problem | None:
    """What is wrong with a request for CPUs whose weights and optimizer alone exceed the memory a worker may take;
    None where they don't, by the `MARGIN`."""
    needed = states_of(plan, arch, "cpu", worker_bytes)
    if needed <= MARGIN * worker_bytes:
        return None
    peak = _peak_on_cpu(arch, _LEAST, worker_bytes)
    error = _does_not_fit(plan, arch, "cpu", needed, worker_bytes, _STATES_ALONE, peak).error
    return Problem(error.param, error.message, error.code)


def check_states(plan: Plan, arch: Architecture, worker_bytes: int) -> None:
    """Raises CapacityError `does_not_fit` where weights and optimizer alone exceed the memory of a worker's GPU."""

    def states(plan: Plan, _share: float = 1) -> int:
        return states_of(plan, arch, "cuda", worker_bytes)

    if states(plan) > worker_bytes:
        raise _does_not_fit(plan, arch, "cuda", states(plan), worker_bytes, _STATES_ALONE, states)


def surely_fits(plan: Plan, arch: Architecture, lengths: NDArray[np.int64], worker_bytes: int) -> bool:
    """Whether `check_memory` passes however rows of `lengths` come together. Needs no torch, which takes seconds to
    import; where it says no, `trainers.training.load` looks closer."""
    return _at_most(plan, arch, lengths, worker_bytes) <= MARGIN * worker_bytes


def recomputing_if_needed(plan: Plan, arch: Architecture, lengths: NDArray[np.int64], share: int | None) -> Plan:
    """The plan without activation checkpointing where a worker needn't save memory: all fits its `share` of its node's,
    with the `MARGIN` to spare, however rows of `lengths` come together. `share` None (on GPUs): the plan as it is."""
    if not plan.enable_activation_checkpointing or share is None:
        return plan
    keeping = plan.model_copy(update={"enable_activation_checkpointing": False})
    return keeping if MARGIN * _at_most(keeping, arch, lengths, share) <= share else plan


def check_memory(plan: Plan, arch: Architecture, load: Load, worker_bytes: int) -> None:
    """Raises CapacityError `does_not_fit` for a job on CPUs that needs more than a worker may take, by the `MARGIN`."""
    peak = _peak_on_cpu(arch, load, worker_bytes)
    if peak(plan, 1) > MARGIN * worker_bytes:
        raise _does_not_fit(plan, arch, "cpu", peak(plan, 1), worker_bytes, "at its peak", peak)


def _at_most(plan: Plan, arch: Architecture, lengths: NDArray[np.int64], worker_bytes: int) -> int:
    """Bytes: the peak if the longest rows made one micro-batch, with nothing in common."""
    longest = int(lengths.max())
    if plan.packed:
        positions = plan.batch_size * (plan.max_seq_len or longest)
    else:
        rows = plan.batch_size * (2 if plan.pairs else 1)
        positions = int(np.sort(lengths)[-rows:].sum())
    return memory_of(plan, arch, Load(positions, positions, longest), "cpu", worker_bytes).peak_bytes


_Needed = Callable[[Plan, float], int]
"""Bytes that a worker of a plan needs, of whose micro-batches a share is left."""


def _peak_on_cpu(arch: Architecture, load: Load, worker_bytes: int) -> _Needed:
    def peak(plan: Plan, share: float) -> int:
        left = Load(max(1, int(load.positions * share)), max(1, int(load.trained * share)), load.segment)
        return memory_of(plan, arch, left, "cpu", worker_bytes).peak_bytes

    return peak


def _does_not_fit(
    plan: Plan, arch: Architecture, device: Device, needed: int, worker_bytes: int, when: str, needed_by: _Needed
) -> CapacityError:
    """The error of a plan whose workers need `needed` bytes, with the changes of which each would make it fit: of every
    kind the one that costs least."""
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
    """What could be changed about a plan, the plan then, and the share of its micro-batches that is left."""

    kind: str
    advice: str
    plan: Plan
    share: float = 1


def _changes(plan: Plan, arch: Architecture, device: Device) -> Iterator[_Change]:
    """Those of a kind by what they cost."""
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

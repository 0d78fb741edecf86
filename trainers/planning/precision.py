"""The types that a model is computed and trained in, and which where a plan names none.

fp32 and bf16 are torchtune's: weights, gradients and optimizer state are of that type. In mixed, weights and gradients
are bf16, and of each weight that is trained there is a copy in fp32: the optimizer updates that one, its state is fp32,
and so are checkpoints. For a weight in bf16 has three digits, on which the updates of a usual learning rate are lost:
100 steps at 2e-5 took SmolLM2-135M from a loss of 4.4 to 1.9, mixed and fp32 to 0.012 (benchmarks/training.md).
"""

import re
from functools import cache
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]
Dtype = Literal["fp32", "bf16", "mixed"]
CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Of processors that multiply matrices of bf16 in one instruction. On others bf16 is slower than fp32."""


def default_dtype(device: Device) -> Dtype:
    """mixed where the device computes in bf16. On CPUs that depends on the machine that asks: workers on several
    machines have to agree (`choose_dtype`)."""
    return "mixed" if device == "cuda" or has_bf16(CPU_INFO) else "fp32"


@cache
def has_bf16(cpu_info: Path) -> bool:
    """Whether the processor that Linux describes there has instructions for bf16. Where there is no such file: no."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpu_info.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not BF16_FLAGS.isdisjoint(flags[1].split())

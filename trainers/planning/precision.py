"""Data types for computing and training, and the default if a plan names none.

fp32 and bf16 are as in torchtune: weights, gradients and optimizer state have that type. In mixed, weights and
gradients are bf16, and each trained weight has a copy in fp32. The optimizer updates the copy; its state is fp32, and
so are checkpoints. The reason: a weight in bf16 has three digits, so updates at a usual learning rate are lost to
rounding. 100 steps at 2e-5 took SmolLM2-135M from a loss of 4.4 to 1.9 in bf16, to 0.012 in mixed and in fp32
(benchmarks/training.md).
"""

import re
from functools import cache
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]
Dtype = Literal["fp32", "bf16", "mixed"]
CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Flags in /proc/cpuinfo of processors with instructions for products of bf16 matrices. On others, bf16 is slower than
fp32."""


def default_dtype(device: Device) -> Dtype:
    """mixed if the device computes in bf16, else fp32. For "cpu" this looks at the machine it runs on, so workers on
    several machines have to agree on one (`choose_dtype`)."""
    return "mixed" if device == "cuda" or has_bf16(CPU_INFO) else "fp32"


@cache
def has_bf16(cpu_info: Path) -> bool:
    """Whether the processor that the file `cpu_info` describes has instructions for bf16. False if there is no file."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpu_info.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not BF16_FLAGS.isdisjoint(flags[1].split())

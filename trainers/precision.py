"""The type of weights, gradients and optimizer state where a plan names none: bf16 where the device computes in it."""

import re
from functools import cache
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]
Dtype = Literal["fp32", "bf16"]
CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Of processors that multiply matrices of bf16 in one instruction. On others bf16 is slower than fp32."""


@cache
def default_dtype(device: Device) -> Dtype:
    """On CPUs that of the machine that asks; workers on several machines have to agree (`choose_dtype`)."""
    return "bf16" if device == "cuda" or has_bf16(CPU_INFO) else "fp32"


def has_bf16(cpu_info: Path) -> bool:
    """Whether the processor that Linux describes there has instructions for bf16. Where there is no such file: no."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpu_info.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not BF16_FLAGS.isdisjoint(flags[1].split())

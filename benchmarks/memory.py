"""Memory of the service's processes, as the kernel counts it."""

import re
from typing import NamedTuple

import psutil


class Footprint(NamedTuple):
    """MiB of all processes of one name. PSS divides a page among the processes that map it, so it can be added up; RSS
    can't."""

    name: str
    processes: int
    rss_mib: float
    pss_mib: float


def footprints(processes: list[psutil.Process]) -> list[Footprint]:
    """The memory of the processes by name, largest first. Needs /proc/<pid>/smaps_rollup (Linux)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for process in processes:
        try:
            memory = process.memory_full_info()
            found.setdefault(_name(process), []).append((memory.rss / 2**20, memory.pss / 2**20))
        except psutil.NoSuchProcess:
            continue
    rows = [Footprint(n, len(m), sum(rss for rss, _ in m), sum(pss for _, pss in m)) for n, m in found.items()]
    return sorted(rows, key=lambda row: -row.pss_mib)


def _name(process: psutil.Process) -> str:
    command = process.cmdline()
    text = " ".join(command)
    if text.startswith("ray::"):
        return re.sub(r"[.(].*", "", text).strip()
    for part in ("gcs_server", "raylet", "haproxy"):
        if command and command[0].endswith(f"/{part}"):
            return part
    if match := re.search(r"(\w+)/(\w+)\.py", text):
        return f"{match[1]}/{match[2]}.py"
    if match := re.search(r"-m ([\w.]+)", text):
        return f"python -m {match[1]}"
    return "multiprocessing helper" if "multiprocessing" in text else process.name()

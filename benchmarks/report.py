"""Text of the results: a heading, tables, and the section of a page that each run replaces."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil

SERVICE = Path(__file__).parent / "README.md"
TRAINING = Path(__file__).parent / "training.md"


def heading(command: str, *more: str) -> str:
    """The date, the machine and the command of a measurement."""
    return f"{', '.join((f'{datetime.now(UTC):%Y-%m-%d}', machine(), f'`{command}`', *more))}."


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    memory = psutil.virtual_memory().total / 2**30
    load = os.getloadavg()[0]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, load {load:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_section(name: str, text: str, file: Path) -> None:
    """Replaces the text between the marks of section `name`. Raises ValueError if `file` doesn't have them."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = file.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{file} has no section {name}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")

"""Tables of the training benchmarks: one file, a section for each program, replaced as a whole by its next run."""

from collections.abc import Sequence
from pathlib import Path

TRAINING = Path(__file__).parent / "training.md"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_section(name: str, text: str, file: Path = TRAINING) -> None:
    """Replaces what stands between the marks of `name`. Raises ValueError where `file` has no such marks."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = file.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{file} has no section {name}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")

"""Checks the README, the pinned versions and the set-up scripts against the repository."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from trainers.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(distribution: str) -> list[str]:
    """Normalised names of what the installed distribution requires, extras aside."""
    lines = [line for line in metadata.requires(distribution) or [] if "extra ==" not in line]
    return [normalised(re.split(r"[^A-Za-z0-9._-]", line)[0]) for line in lines]


def table_rows(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading of the README, without its two header lines."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip().strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_pin_is_an_exact_public_version() -> None:
    assert PINS
    for line in PINS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), f"{line!r} is no exact public version"


def test_everything_we_depend_on_is_pinned() -> None:
    pinned = {normalised(line.split("==")[0]) for line in PINS}
    assert set(requirements("tunewright")) <= pinned


def test_no_dependency_is_the_pypi_package_that_is_named_like_our_events() -> None:
    assert not any(normalised(line.split("==")[0]) == "events" for line in PINS)
    for distribution in metadata.distributions():
        assert normalised(distribution.metadata["Name"]) != "events"


def test_readme_documents_exactly_the_settings_there_are() -> None:
    documented = {row[0].strip("`"): row[2] for row in table_rows("Settings")}
    fields = {f"TUNEWRIGHT_{name.upper()}": field.description for name, field in Settings.model_fields.items()}
    assert documented == fields


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_readme_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_readme_tree_names_only_what_exists() -> None:
    tree = README.split("## Where things are\n", 1)[1].split("```", 2)[1]
    folders: list[str] = []
    for line in filter(str.strip, tree.removeprefix("text").splitlines()):
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        path = "".join([*folders, name])
        assert (ROOT / path).exists(), f"{path} is in README's tree only"
        if name.endswith("/"):
            folders.append(name)


def test_make_targets_named_in_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= targets


def test_an_interpreter_may_have_a_space_in_its_path(tmp_path: Path) -> None:
    python = tmp_path / "my python" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    command = [ROOT / ".ci" / "find-python"]
    done = subprocess.run(
        command, env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable), done.stderr


def test_no_interpreter_fits_is_said_in_words() -> None:
    done = subprocess.run(
        [ROOT / ".ci" / "find-python"], env={"PYTHON": "no-such-python", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no Python 3.11 or 3.12" in done.stderr

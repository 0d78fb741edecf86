"""docs/configuration.md agrees with the code: it has every key, component, flag and default."""

from pathlib import Path

import pytest

from trainers.planning.components import COMPONENTS, DEFAULTS, SECTIONS
from trainers.planning.keys import KEYS, REFUSED, Key
from trainers.planning.overrides import refused_flags

DOC = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")


def code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_has_a_row(key: Key) -> None:
    assert f"| `{key.name}` | {code(key.aliases)} | {key.default} | {key.meaning} |" in DOC


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_has_a_row(name: str) -> None:
    component = COMPONENTS[name]
    default = " (default)" if DEFAULTS.get(component.section) == name else ""
    assert f"| `{component.section}` | `{name}`{default} | {code(tuple(component.arguments))} |" in DOC


@pytest.mark.parametrize("key", REFUSED)
def test_every_refused_key_has_a_row(key: str) -> None:
    assert f"| `{key}` | {REFUSED[key]} |" in DOC


def test_every_refused_flag_has_a_row() -> None:
    for flag, reason in refused_flags().items():
        assert f"| `{flag}` | {reason} |" in DOC


def test_no_row_names_an_unknown_key() -> None:
    rows = [line.split("`")[1] for line in DOC.splitlines() if line.startswith("| `")]
    known = {key.name for key in KEYS} | set(SECTIONS) | REFUSED.keys() | refused_flags().keys()
    assert set(rows) - known == {"--nproc_per_node N", "--nnodes N", "--max-restarts N"}

"""Imports point one way, serve_app -> trainers -> events, and only modules that train or use models import torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "events": {"events"},
    "trainers": {"trainers", "events"},
    "serve_app": {"serve_app", "trainers", "events"},
}
# For each package within trainers, those that it must not import.
MAY_NOT_IMPORT = {
    "planning": {"training", "running", "dispatching"},
    "training": {"running", "dispatching"},
    "dispatching": {"training", "running"},
}
HEAVY = ("torch", "torchtune", "ray.train")
# Modules that run where a model is trained or used. The API, the dispatcher and the command line import all others.
TRAINING_MODULES = (
    "trainers.methods",
    "trainers.methods.dora",
    "trainers.methods.full",
    "trainers.methods.lora",
    "trainers.methods.method",
    "trainers.methods.qat",
    "trainers.methods.qlora",
    "trainers.models.adapters",
    "trainers.models.attention",
    "trainers.models.chat_model",
    "trainers.models.decoder",
    "trainers.models.export_files",
    "trainers.models.feed_forward",
    "trainers.models.generate",
    "trainers.models.norm",
    "trainers.models.rope",
    "trainers.models.short_attention",
    "trainers.models.weights",
    "trainers.running.controller",
    "trainers.running.fit",
    "trainers.running.worker",
    "trainers.training.autograd",
    "trainers.training.batches",
    "trainers.training.checkpoint",
    "trainers.training.collate",
    "trainers.training.distributed",
    "trainers.training.export",
    "trainers.training.load",
    "trainers.training.loss",
    "trainers.training.mixed_adam",
    "trainers.training.objectives",
    "trainers.training.optimization",
    "trainers.training.progress_log",
    "trainers.training.recipe",
    "trainers.training.reference",
    "trainers.training.training_model",
)


def imports_of(source: Path) -> Iterator[str]:
    """Dotted names in all import statements of the file, nested ones included."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative imports hide which way they point"
            yield node.module or ""


def modules(package: str) -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py")]
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_only_point_right(package: str) -> None:
    for source in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name in imports_of(source)} & MAY_IMPORT.keys()
        assert ours <= MAY_IMPORT[package], f"{source.relative_to(ROOT)} imports {ours - MAY_IMPORT[package]}"


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_plans_know_nothing_of_training_nor_training_of_what_runs_it(package: str) -> None:
    for source in (ROOT / "trainers" / package).rglob("*.py"):
        for name in imports_of(source):
            top, _, rest = name.partition(".")
            assert top != "trainers" or rest.partition(".")[0] not in MAY_NOT_IMPORT[package], (
                f"{source} imports {name}"
            )


@pytest.mark.parametrize("module", TRAINING_MODULES)
def test_a_module_that_may_import_torch_exists(module: str) -> None:
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_nothing_that_the_service_imports_brings_in_torch() -> None:
    light = [m for package in MAY_IMPORT for m in modules(package) if m not in TRAINING_MODULES and "__main__" not in m]
    # Imported one after the other in one process, so that the error names the first module that imports one of HEAVY.
    script = f"""
import importlib, sys
for module in {light!r}:
    importlib.import_module(module)
    found = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    assert not found, f"importing {{module}} imports {{found}}"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr.splitlines()[-1]

"""Defers the `__init__` of packages that import far more than we use, until something defined in it is needed.

torchtune's imports all its models and data sets, and with them pandas and Hugging Face's datasets; torchao's imports
everything for quantisation. That takes seconds, in processes that need a few layers of the one and nothing of the
other. The packages listed here, and modules in them, can be imported without that. The `__init__` of a package runs the
first time that an attribute of it is looked up which isn't a module, after those of the packages around it.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGES = frozenset(
    {
        "torchao",
        "torchao.dtypes",
        "torchtune",
        "torchtune.models",
        "torchtune.models.gemma",
        "torchtune.training",
    }
)


def defer() -> None:
    """Turns deferring on for this process. Has no effect on packages that are imported already."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)  # a class with a static find_spec is a finder, too


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    def __init__(self, own: Any) -> None:  # noqa: ANN401
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._own.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__:
            module.__spec__.loader = self._own
        module.__dict__["__getattr__"] = _LookUp(module, self._own)


class _LookUp:
    """The `__getattr__` of a package whose `__init__` hasn't run."""

    def __init__(self, module: ModuleType, loader: Any) -> None:  # noqa: ANN401
        self._module = module
        self._loader = loader

    def __call__(self, name: str) -> Any:  # noqa: ANN401
        if name.startswith("__") and name not in ("__all__", "__version__"):  # tools look these up in every module
            raise AttributeError(name)
        if find_spec(f"{self._module.__name__}.{name}"):
            return import_module(f"{self._module.__name__}.{name}")
        self._run()
        return getattr(self._module, name)

    def _run(self) -> None:
        # Outer packages first, as in a normal import: torchao's packages import each other in a circle.
        around = sys.modules.get(self._module.__name__.rpartition(".")[0])
        if around and isinstance(look_up := around.__dict__.get("__getattr__"), _LookUp):
            look_up._run()
        if self._module.__dict__.get("__getattr__") is not self:
            return  # running the outer ones has run this one, too
        del self._module.__dict__["__getattr__"]
        try:
            self._loader.exec_module(self._module)
        except BaseException:
            self._module.__dict__["__getattr__"] = self
            raise

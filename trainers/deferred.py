"""Packages whose `__init__` imports far more than we use of them, made to run it only when something of it is wanted.

torchtune's imports all its models and data sets, and with them pandas and Hugging Face's datasets; torchao's, every way
to quantise: seconds of a process that wants a few layers of the one and nothing of the other. The packages listed here
can be imported, and modules out of them, without that. Their `__init__` runs, whole and after that of the packages
around it, the first time something is looked up in the package that is no module of it.
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
    """From now on, in this process. A package that is imported already stays as it is."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)  # it asks for no more than this


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
        if name.startswith("__") and name not in ("__all__", "__version__"):  # what tools ask of every module
            raise AttributeError(name)
        if find_spec(f"{self._module.__name__}.{name}"):
            return import_module(f"{self._module.__name__}.{name}")
        self._run()
        return getattr(self._module, name)

    def _run(self) -> None:
        # The packages around it first, as Python would have it: torchao's import each other in a circle.
        around = sys.modules.get(self._module.__name__.rpartition(".")[0])
        if around and isinstance(look_up := around.__dict__.get("__getattr__"), _LookUp):
            look_up._run()
        if self._module.__dict__.get("__getattr__") is not self:
            return  # they have seen to it
        del self._module.__dict__["__getattr__"]
        try:
            self._loader.exec_module(self._module)
        except BaseException:
            self._module.__dict__["__getattr__"] = self
            raise

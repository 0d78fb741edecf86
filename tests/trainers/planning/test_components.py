"""The allow-list of components: each one exists, and takes the arguments that are listed for it."""

import inspect
from importlib import import_module
from typing import Any

import pytest

from trainers.planning.components import COMPONENTS, DEFAULTS, allowed, missing_package
from trainers.training.optimization import SCHEDULES


def load(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_exists_and_takes_the_arguments_listed(name: str) -> None:
    if package := missing_package(name):
        pytest.skip(f"{package} is not installed")
    parameters = inspect.signature(SCHEDULES.get(name) or load(name)).parameters
    component = COMPONENTS[name]
    assert component.arguments.keys() | component.computed.keys() <= parameters.keys()


def test_every_section_has_a_default_on_its_list() -> None:
    for section, name in DEFAULTS.items():
        assert name in allowed(section)

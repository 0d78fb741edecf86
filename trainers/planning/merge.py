"""Merges layers of settings, later ones over earlier ones. Checks each value, and remembers where it came from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from trainers.errors import MOST_PROBLEMS, Problem
from trainers.planning.components import COMPONENTS, DEFAULTS, OPTIONAL, SECTIONS, allowed, conflicts, missing_package
from trainers.planning.keys import BY_NAME, REFUSED, unknown_argument, unknown_key
from trainers.planning.values import shown

_ALIAS_SECTIONS = frozenset(name.partition(".")[0] for name in BY_NAME if "." in name)
_NESTED = frozenset(SECTIONS) | _ALIAS_SECTIONS


class _Setting(NamedTuple):
    """`param`: the field of the request that a problem names. `prefix`: what messages begin with."""

    value: Any
    param: str
    prefix: str


class _Section:
    """The state of one component section while layers are merged. `absent`: there is no component, by default or
    because the user set null. `refused`: the user named a component that isn't allowed."""

    def __init__(self, default: str | None) -> None:
        self.default = default
        self.component: _Setting | None = None
        self.arguments: dict[str, _Setting] = {}
        self.absent = default is None
        self.refused = False

    @property
    def name(self) -> str | None:
        return self.component.value if self.component else self.default

    def choose(self, setting: _Setting) -> None:
        """Selects the component; drops the arguments of an earlier layer if that had another component."""
        if self.name not in (None, setting.value):
            self.arguments.clear()
        self.component, self.absent = setting, False

    def remove(self) -> None:
        self.component, self.absent = None, True
        self.arguments.clear()

    def set(self, name: str, setting: _Setting) -> None:
        self.arguments[name], self.absent = setting, False


class Merged:
    """Add layers with `options` and `settings`, then read `problems`, `values` and `components`."""

    def __init__(self, method: str) -> None:
        self.problems: list[Problem] = []
        self._method = method
        self._values: dict[str, _Setting] = {}
        self._sections = {section: _Section(DEFAULTS.get(section)) for section in SECTIONS}

    def options(self, values: Mapping[str, Any], parent: str) -> None:
        """Adds fields of the request that have the name of a key. Pydantic has checked their types."""
        for name, value in values.items():
            self._put(name, _Setting(value, f"{parent}.{name}", ""))

    def settings(self, pairs: list[tuple[str, Any]], param: Callable[[str], str], *, named: bool = False) -> None:
        """Adds a layer of keys, nested or dotted. `param` gives the field of the request for a key. `named`: messages
        begin with the key, as the field doesn't name it."""
        seen: dict[str, str] = {}
        removed: set[str] = set()
        leaves = [leaf for key, value in pairs for leaf in _leaves(str(key), value)]
        if len(leaves) > MOST_PROBLEMS:
            message = f"{len(leaves)} settings in one place are more than there are keys"
            self.problems.append(Problem(param(leaves[0][0]), message))
            return
        leaves.sort(key=lambda leaf: not _canonical(leaf[0]).endswith("._component_"))  # before its arguments
        for key, value in leaves:
            setting = _Setting(value, param(key), f"{key}: " if named else "")
            canonical = _canonical(key)
            section, _, argument = canonical.partition(".")
            if canonical in seen:
                other = "" if seen[canonical] == key else f" (as {seen[canonical]} too)"
                self._problem(setting, f"is given twice{other}", "duplicate_key")
            if argument == "_component_" and value is None:
                removed.add(section)
            elif argument and section in removed:
                self._problem(setting, f"is an argument of nothing: {section} is null beside it")
            seen[canonical] = key
            self._put(key, setting)

    def _put(self, key: str, setting: _Setting) -> None:
        section, _, argument = key.partition(".")
        if key in BY_NAME:
            self._put_value(key, setting)
        elif section in self._sections:
            self._put_component(self._sections[section], section, argument, setting)
        elif section in REFUSED and not (section in _ALIAS_SECTIONS and argument):
            self._problem(setting, f"can't be set here: {REFUSED[section]}", "unsupported_key")
        else:
            self._problem(setting, unknown_key(key), "unknown_key")

    def _put_value(self, name: str, setting: _Setting) -> None:
        key = BY_NAME[name]
        if key.only and key.only != self._method:
            self._problem(setting, "has no meaning in full fine-tuning: only LoRA has adapters")
            return
        try:
            self._values[key.name] = setting._replace(value=key.check(setting.value))
        except ValueError as error:
            self._problem(setting, str(error))

    def _put_component(self, part: _Section, section: str, argument: str, setting: _Setting) -> None:
        if argument and argument != "_component_":
            part.set(argument, setting)
        elif setting.value is None and section in OPTIONAL:
            part.remove()
        elif isinstance(setting.value, str) and setting.value in allowed(section):
            if package := missing_package(setting.value):
                message = f"{setting.value} needs the package {package}, which isn't installed on the cluster"
                self._problem(setting, message, "component_not_installed")
            part.choose(setting)
        else:
            part.refused = True  # its arguments can't be checked
            choices = ", ".join(allowed(section))
            self._problem(
                setting, f"{shown(setting.value)} is not on the list of components: {choices}", "component_not_allowed"
            )

    def _problem(self, setting: _Setting, message: str, code: str = "invalid_value") -> None:
        self.problems.append(Problem(setting.param, setting.prefix + message, code))

    def param(self, key: str) -> str | None:
        """The field of the request that set `key` (a setting or a component section); None if it has its default."""
        component = self._sections[key].component if key in self._sections else None
        setting = component or self._values.get(key)
        return setting.param if setting else None

    def values(self) -> dict[str, Any]:
        return {key: setting.value for key, setting in self._values.items()}

    def components(self) -> dict[str, tuple[str, dict[str, Any]] | None]:
        """For each section, the component and its checked arguments; None if there is no component."""
        return {name: self._finish(name, part) for name, part in self._sections.items()}

    def _finish(self, section: str, part: _Section) -> tuple[str, dict[str, Any]] | None:
        if part.absent or part.refused:
            return None
        if part.name is None:
            message = f"needs {section}._component_ too: {', '.join(allowed(section))}"
            self._problem(next(iter(part.arguments.values())), message, "missing")
            return None
        component, kwargs = COMPONENTS[part.name], {}
        for name, setting in part.arguments.items():
            if name in component.computed:
                self._problem(setting, f"can't be set: {component.computed[name]}", "unsupported_key")
            elif name not in component.arguments:
                self._problem(setting, unknown_argument(name, part.name), "unknown_key")
            else:
                try:
                    kwargs[name] = component.arguments[name](setting.value)
                except ValueError as error:
                    self._problem(setting, str(error))
        for name, message in conflicts(part.name, kwargs):
            self._problem(part.arguments[name], message)
        return part.name, kwargs


def canonical_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """The canonical names of the settings in one layer, each with the spelling used there."""
    leaves = (leaf for key, value in pairs for leaf in _leaves(str(key), value))
    return {_canonical(key): key for key, _ in leaves}


def _canonical(key: str) -> str:
    """The canonical name of a key that has several spellings."""
    if key in BY_NAME:
        return BY_NAME[key].name
    return f"{key}._component_" if key in SECTIONS else key


def _leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    """The dotted keys under `key`, with their values. Opens sections only, so it never goes deeper than one level."""
    if key in _NESTED and isinstance(value, Mapping):
        for name, inner in value.items():
            yield f"{key}.{name}", inner
    else:
        yield key, value

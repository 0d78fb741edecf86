"""An actor that is started and killed by others while code under test looks for it by name."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

from events.actors import NAMESPACE
from tests.waiting import WAIT_S, eventually


class EndedWhileLookedUp:
    """Ray looks an actor's name up three times when it gets or creates the actor. Here the first look-up finds none;
    just before the second, another actor of that name is started; just before the third, it is killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: Callable[[], ActorHandle[Any]], name: str) -> None:
        self.other: ActorHandle[Any]
        """The actor that was started and killed."""
        self.looks = 0
        self._monkeypatch, self._start, self._name = monkeypatch, start, name
        self._get_actor = ray.get_actor
        monkeypatch.setattr(ray, "get_actor", self._look_up)

    def _look_up(self, name: str, namespace: str | None = None) -> ActorHandle[Any]:
        if name == self._name:
            self.looks += 1
            if self.looks == 2:
                with self._monkeypatch.context() as meanwhile:
                    meanwhile.setattr(ray, "get_actor", self._get_actor)
                    self.other = self._start()
            if self.looks == 3:
                ray.kill(self.other)
                eventually(lambda: not self._is_named(), WAIT_S, lambda: f"the name {name} is not free")
        return self._get_actor(name, namespace)

    def _is_named(self) -> bool:
        with suppress(ValueError):
            return bool(self._get_actor(self._name, NAMESPACE))
        return False

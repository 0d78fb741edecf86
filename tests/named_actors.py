"""Names of actors that change hands while Ray looks them up."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

from events.actors import NAMESPACE
from tests.waiting import WAIT_S, eventually


class EndedWhileLookedUp:
    """To get an actor or make it, Ray looks for its name three times. There is none; from the second time on there is
    one that another process has started; and before the third time that is killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: Callable[[], ActorHandle[Any]], name: str) -> None:
        self.other: ActorHandle[Any]
        """The one that was there meanwhile."""
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

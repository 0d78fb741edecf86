"""A cluster's dispatcher is that of the last deploy, with its settings, whichever other process connects."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from events.actors import EVENT_LOG, NAMESPACE, Handles, blocking
from tests.conftest import RayCluster
from tests.named_actors import EndedWhileLookedUp
from tests.waiting import WAIT_S, eventually
from trainers.dispatching.cluster import Cluster, Runner
from trainers.dispatching.dispatcher_actor import NAME, DispatcherActor, DispatcherClient, start_dispatcher
from trainers.dispatching.drain import drain
from trainers.errors import UserError
from trainers.settings import Settings
from trainers.webhooks.client import WebhooksClient

FIRST, SECOND = 1_000.0, 2_000.0
"""Times at which two deploys were built."""


class Deploys:
    """Two sets of settings of one service: under the second one webhooks may be sent to this machine."""

    def __init__(self, storage: Path) -> None:
        self.old = Settings(storage=storage)
        self.new = Settings(storage=storage, webhook_networks="127.0.0.0/8")

    @staticmethod
    def takes_webhooks_here(dispatcher: DispatcherClient) -> bool:
        """Whether the dispatcher that is called has the new settings."""
        try:
            blocking(WebhooksClient(dispatcher).create("we_1", "whsec_AAAA", "n", "http://127.0.0.1:9/", []))
        except UserError as refused:
            return refused.error.code != "webhook_url_refused"
        return True


@pytest.fixture
def deploys(handles: Handles, tmp_path: Path) -> Deploys:
    """`handles` ends the dispatcher as well."""
    return Deploys(tmp_path)


@contextmanager
def log_away(storage: Path) -> Iterator[None]:
    """While entered, no event log runs: each that is started ends, because it can't open its file. Afterwards the log
    is empty."""
    aside = storage / "aside"
    aside.mkdir()
    for file in storage.glob("events.db*"):
        file.rename(aside / file.name)
    (storage / "events.db").mkdir()
    ray.kill(ray.get_actor(EVENT_LOG, NAMESPACE))
    yield
    (storage / "events.db").rmdir()


def pid_of(dispatcher: DispatcherClient) -> int:
    pid: int = blocking(dispatcher.call("__ray_call__", lambda _: os.getpid()))
    return pid


def ask(actor: ActorHandle[DispatcherActor], method: str, *arguments: object) -> ObjectRef[Any]:
    """Calls a method by its name: Ray's types don't know which methods an actor has."""
    answer: ObjectRef[Any] = getattr(actor, method).remote(*arguments)
    return answer


def test_a_deploy_brings_its_settings_to_the_dispatcher_that_is_there_and_its_restarts_keep_them(
    deploys: Deploys,
) -> None:
    before = DispatcherClient(deploys.old, FIRST)
    assert not deploys.takes_webhooks_here(before)
    after = DispatcherClient(deploys.new, SECOND)
    assert deploys.takes_webhooks_here(after)
    assert deploys.takes_webhooks_here(before)  # a replica that is still draining: it finds the new one

    killed = pid_of(after)
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: pid_of(after) != killed, WAIT_S, lambda: "Ray does not start it again")
    assert deploys.takes_webhooks_here(after)


def test_a_dispatcher_that_starts_again_without_its_log_waits_for_it_and_goes_on_by_itself(
    deploys: Deploys, tmp_path: Path
) -> None:
    actor = start_dispatcher(deploys.new, FIRST)
    pid: int = ray.get(ask(actor, "__ray_call__", lambda _: os.getpid()))
    with log_away(tmp_path):
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not psutil.pid_exists(pid), WAIT_S, lambda: "the dispatcher goes on")
        for _ in range(3):  # more often than by callers that were already under way
            started = tmp_path / "events.db.lock"
            started.unlink(missing_ok=True)
            eventually(started.exists, WAIT_S, lambda: "nobody starts the log")
    assert ray.get(ask(actor, "deployed_at"), timeout=WAIT_S) == FIRST
    assert ray.get(ask(actor, "__ray_call__", lambda _: os.getpid())) != pid


def test_a_drain_that_a_dispatcher_without_its_log_does_not_answer_fails_and_does_not_begin_later(
    deploys: Deploys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    actor = start_dispatcher(deploys.new, FIRST)
    pid: int = ray.get(ask(actor, "__ray_call__", lambda _: os.getpid()))
    monkeypatch.setattr("trainers.dispatching.drain.ANSWER_S", 1.0)
    with log_away(tmp_path):
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not psutil.pid_exists(pid), WAIT_S, lambda: "the dispatcher goes on")
        assert drain(0.5) == 1
    assert "the dispatcher does not answer" in capsys.readouterr().err

    def looks_and_drains() -> tuple[int, bool]:
        told: tuple[int, bool] = ray.get(
            ask(actor, "__ray_call__", lambda self: (self._dispatcher._looks, self._dispatcher._draining))
        )
        return told

    eventually(lambda: looks_and_drains()[0] > 2, WAIT_S, lambda: "it makes no pass")
    assert not looks_and_drains()[1]


def test_a_drain_says_why_the_dispatcher_can_not_tell_what_runs(
    deploys: Deploys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actor = start_dispatcher(deploys.new, FIRST)
    eventually(lambda: drain(5) == 0, WAIT_S, lambda: "the dispatcher makes no pass")
    with log_away(tmp_path):

        def failing() -> bool:
            return bool(ray.get(actor.__ray_call__.remote(lambda self: self._dispatcher._trouble is not None)))

        eventually(failing, WAIT_S, lambda: "the dispatcher doesn't notice")
        assert drain(0.5) == 1
    assert "tunewright: nobody knows what runs: tunewright-event-log" in capsys.readouterr().err


def test_neither_an_earlier_deploy_nor_a_command_line_replaces_the_dispatcher(
    deploys: Deploys, caplog: pytest.LogCaptureFixture
) -> None:
    ours = start_dispatcher(deploys.new, SECOND)
    assert start_dispatcher(deploys.old, FIRST) == ours
    assert ("ERROR", "the dispatcher is of a later deploy, by 1000.0 s, and stays") in [
        (record.levelname, record.getMessage()) for record in caplog.records
    ]
    assert start_dispatcher(deploys.old) == ours
    assert deploys.takes_webhooks_here(DispatcherClient(deploys.old))


def test_replicas_of_a_deploy_that_start_together_get_one_dispatcher(deploys: Deploys) -> None:
    start_dispatcher(deploys.old)
    with ThreadPoolExecutor(4) as replicas:
        started = list(replicas.map(lambda _: start_dispatcher(deploys.new, SECOND), range(4)))
    assert len(set(started)) == 1
    assert deploys.takes_webhooks_here(DispatcherClient(deploys.old))


@pytest.mark.parametrize("deployed_at", [None, SECOND], ids=["command line", "deploy"])
def test_a_dispatcher_that_another_replica_starts_and_ends_while_its_name_is_looked_up_is_started_again(
    deploys: Deploys, deployed_at: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    race = EndedWhileLookedUp(monkeypatch, lambda: start_dispatcher(deploys.old), NAME)
    started = start_dispatcher(deploys.new, deployed_at)
    assert race.looks > 3
    assert started != race.other
    assert ray.get(ask(started, "whys"), timeout=WAIT_S) == {}


def test_a_dispatcher_of_a_version_that_knew_nothing_of_deploys_is_replaced(
    deploys: Deploys, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.delattr(DispatcherActor, "deployed_at")
        old = start_dispatcher(deploys.old)
    assert start_dispatcher(deploys.new, SECOND) != old
    assert deploys.takes_webhooks_here(DispatcherClient(deploys.old))


def test_a_dispatcher_that_was_killed_for_good_is_started_again_by_who_calls_it(deploys: Deploys) -> None:
    client = DispatcherClient(deploys.new, SECOND)
    assert deploys.takes_webhooks_here(client)
    ray.kill(start_dispatcher(deploys.new))

    async def calls() -> list[dict[str, str]]:
        answers: list[dict[str, str]] = await asyncio.gather(*(client.call("whys") for _ in range(3)))
        return answers

    assert asyncio.run(calls()) == [{}] * 3
    assert deploys.takes_webhooks_here(client)


def test_callers_who_give_up_on_a_dispatcher_that_is_being_started_leave_one_thread_behind_and_get_its_result(
    deploys: Deploys, tmp_path: Path
) -> None:
    client, actor = DispatcherClient(deploys.new, FIRST), start_dispatcher(deploys.new)

    def threads() -> int:
        return sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())

    async def polled() -> int:
        """The threads that three such callers took."""
        before = threads()
        for _ in range(3):
            with suppress(TimeoutError):
                await asyncio.wait_for(client.call("whys"), 1)
        return threads() - before

    async def ask_until_it_is_noticed() -> None:
        while True:
            await ask(actor, "whys")

    async def scenario() -> None:
        with log_away(tmp_path):
            ray.kill(actor)
            with pytest.raises(RayActorError):
                await ask_until_it_is_noticed()
            assert await polled() == 1
        assert await client.call("whys") == {}

    asyncio.run(scenario())


def test_the_dispatcher_finds_the_dashboard_wherever_it_listens_also_where_no_variable_names_the_cluster(
    ray_cluster: RayCluster,
) -> None:
    """The shell of `ray start --head` may have no RAY_ADDRESS, by which Ray's own client finds the dashboard."""

    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"RAY_ADDRESS": ""}})
    def runner() -> Runner:
        return Cluster().runner("ftjob-unknown")

    assert ray.get(runner.remote()).state == "absent"

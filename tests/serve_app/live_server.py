"""The HTTP API on a real socket, in front of a real event log and log queue; only Ray is left out."""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn

from events.facts import CheckpointSaved, Event, Resources
from events.ids import new_event_id
from events.log import EventLog
from events.log_queue import LogQueue
from events.sqlite import LOG_FILE, SqliteStore
from serve_app.api import build_api
from serve_app.chat.deployment import load
from serve_app.chat.torchtune_engine import TorchtuneEngine
from tests.events.facts_of_a_job import BEGUN
from trainers.answers import Answers
from trainers.errors import ConfigProblems, Problem
from trainers.estimate import Asked, Found, answer
from trainers.models.architecture import Architecture
from trainers.models.chat_model import ChatModel
from trainers.planning.fitting import states_fit
from trainers.planning.plan import Plan
from trainers.settings import Settings
from trainers.webhooks.deliverer import Webhooks

T = TypeVar("T")

MODEL = "smollm2-135m-instruct"
LARGEST_JOB = 4


class Parts:
    """The service without a cluster. Its capacity is `LARGEST_JOB` workers of `worker_bytes`; nobody runs the jobs but
    the test. Estimates are made in this process: one of their own takes seconds to import what it needs."""

    worker_bytes = 1 << 30

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log = EventLog(SqliteStore(settings.storage / LOG_FILE))
        self.logs = LogQueue(settings.storage)
        self.webhooks = Webhooks(self.log, settings)
        self.waiting: dict[str, str] = {}
        self.models: dict[str, ChatModel] = {}
        self.answers: Answers = TorchtuneEngine(self._model)

    async def _model(self, name: str) -> ChatModel:
        """As in a replica, but without Ray, and kept until the tests end."""
        if name not in self.models:
            self.models[name] = await asyncio.to_thread(load, name, self.settings)
        return self.models[name]

    async def whys(self) -> dict[str, str]:
        return self.waiting

    async def resources(self, plan: Plan, architecture: Architecture | None) -> Resources:
        if plan.workers > LARGEST_JOB:
            raise ConfigProblems([Problem("overrides", "this cluster can never hold the job", "infeasible_resources")])
        if architecture is not None and (problem := states_fit(plan, architecture, self.worker_bytes)):
            raise ConfigProblems([problem])
        return Resources(workers=plan.workers, nodes=plan.nnodes, cpus_per_worker=1, gpus_per_worker=0)

    async def estimate(self, plan: Plan, resources: Resources) -> Found:
        asked = Asked(plan=plan, device="cpu", worker_bytes=self.worker_bytes)
        return (await asyncio.to_thread(answer, asked, self.settings)).result()


class Server:
    """A running API. `parts` belongs to the server's event loop: tests reach it through `do`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._closing = asyncio.Event()
        api = build_api(parts, parts.answers, closing=self._closing)
        self._server = uvicorn.Server(uvicorn.Config(api, log_level="warning", timeout_graceful_shutdown=1))
        self._loop: asyncio.AbstractEventLoop
        started = threading.Event()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            started.set()
            delivering = asyncio.create_task(parts.webhooks.run())
            await self._server.serve(sockets=[self._socket])
            delivering.cancel()
            await parts.webhooks.close()
            await parts.log.close()
            await parts.logs.close()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()))
        self._thread.start()
        started.wait()

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(timeout=60)

    def config(self, **changes: Any) -> dict[str, Any]:
        """The smallest good request, on the rows that the fixture `serve` has written, with changes."""
        return {"model": MODEL, "data": str(self.parts.settings.storage / "rows.jsonl")} | changes

    def submit(self, **changes: Any) -> str:
        """A job of this config; its id."""
        answer = httpx.post(f"{self.url}/fine_tuning/jobs/submit", json=self.config(**changes), timeout=30)
        assert answer.status_code == 200, answer.text
        job_id: str = answer.json()["job_id"]
        return job_id

    def append(self, job_id: str, *events: Event) -> None:
        self.do(self.parts.log.append(job_id, list(events), [new_event_id() for _ in events]))

    def train(self, job_id: str, *steps: int) -> dict[int, Path]:
        """Records that the job runs and has saved a checkpoint at each of the steps. Returns the checkpoints'
        directories, which don't exist yet."""
        checkpoints = self.parts.settings.job_dir(job_id) / "checkpoints"
        saved = {step: checkpoints / f"step-{step:08d}" for step in steps}
        facts = [CheckpointSaved(attempt=1, step=step, epoch=0, uri=path.as_uri()) for step, path in saved.items()]
        self.append(job_id, *BEGUN, *facts)
        return saved

    def print(self, job_id: str, *messages: str, seq: int = 0) -> None:
        lines = [("2026-01-02T03:04:05.678Z", message) for message in messages]
        self.do(self.parts.logs.append(job_id, "worker", seq, lines))

    def close_tails(self) -> None:
        """What a replica does before it ends."""
        self._loop.call_soon_threadsafe(self._closing.set)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=60)


Serve = Callable[..., Server]
"""Starts a server; the arguments are settings, or `parts_type`."""

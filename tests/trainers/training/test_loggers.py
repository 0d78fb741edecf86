"""The loggers: JSON lines on disk that a resumed run continues, and a real (offline) W&B run."""

import json
import logging
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import wandb

from events.facts import StepMetrics
from tests.full_disk import full_disk
from tests.power_cut import PowerCut
from tests.trainers.recipe_support import make_plan_for
from tests.waiting import WAIT_S, eventually
from tests.wandb_file import end_of
from trainers.planning.plan import DiskLog, WandBLog
from trainers.training import loggers
from trainers.training.loggers import End, open_logger

TIME = "2026-11-22T20:00:00Z"


def step(number: int, **values: Any) -> StepMetrics:
    return StepMetrics(step=number, epoch=1, time=TIME, **values)


def write(job_dir: Path, steps: list[StepMetrics], resumed_step: int = 0) -> Path:
    logger = open_logger(make_plan_for(logger=DiskLog(filename="m.jsonl")), "ftjob-1", job_dir, resumed_step)
    for metrics in steps:
        logger.log(metrics)
    logger.close("finished")
    return Path(urlsplit(logger.uri).path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_disk_has_one_line_for_each_step_with_the_values_that_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "job", [step(1, loss=0.5, lr=0.1), step(1, valid_loss=0.25)])
    assert path == tmp_path / "job" / "m.jsonl"
    assert lines(path) == [
        {"step": 1, "epoch": 1, "time": TIME, "loss": 0.5, "lr": 0.1},
        {"step": 1, "epoch": 1, "time": TIME, "valid_loss": 0.25},
    ]


def test_a_power_cut_takes_nothing_of_what_an_earlier_run_has_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, [step(1, loss=0.5), step(2, loss=0.25)])
    power_cut, replace = PowerCut(monkeypatch), Path.replace
    kept: list[bool] = []

    def replacing(draft: Path, target: Path) -> Path:
        kept.append(power_cut.leaves_content(draft))
        return replace(draft, target)

    monkeypatch.setattr(Path, "replace", replacing)
    write(tmp_path, [step(3, loss=0.125)], resumed_step=2)
    assert kept == [True]
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_a_value_that_is_no_number_is_still_a_line_of_json(tmp_path: Path) -> None:
    path = write(tmp_path, [step(1, loss=0.5, grad_norm=float("inf")), step(1, valid_loss=float("nan"))])

    def no_json(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    read = [json.loads(line, parse_constant=no_json) for line in path.read_text().splitlines()]
    assert [read[0]["grad_norm"], read[1]["valid_loss"]] == ["Infinity", "NaN"]


def test_a_file_name_may_be_as_long_as_a_request_may_say(tmp_path: Path) -> None:
    plan = make_plan_for(logger=DiskLog(filename="m" * 255))
    for resumed_step in (0, 1):
        logger = open_logger(plan, "ftjob-1", tmp_path, resumed_step)
        logger.log(step(resumed_step + 1, loss=0.5))
        logger.close("finished")
    assert [line["step"] for line in lines(tmp_path / ("m" * 255))] == [1, 2]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = open_logger(make_plan_for(logger=DiskLog(filename="m.jsonl")), "ftjob-1", tmp_path, 0)
    logger.log(step(1, loss=0.5))
    assert len(lines(tmp_path / "m.jsonl")) == 1
    logger.close("finished")


def test_a_resumed_run_repeats_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, [step(n, loss=n) for n in range(1, 6)])
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # the line that a killed process was writing
    write(tmp_path, [step(n, loss=10 * n) for n in range(4, 7)], resumed_step=3)
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_whoever_has_the_file_open_when_a_newer_run_takes_it_over_writes_nothing_more_into_it(tmp_path: Path) -> None:
    plan = make_plan_for(logger=DiskLog(filename="m.jsonl"))
    old, new = (open_logger(plan, "ftjob-1", tmp_path, resumed) for resumed in (0, 1))
    old.log(step(1, loss=1))
    old.log(step(2, loss=2))
    new.log(step(2, loss=20))
    old.log(step(3, loss=3))
    new.log(step(3, loss=30))
    assert [line["loss"] for line in lines(tmp_path / "m.jsonl")] == [1, 20, 30]
    open_logger(plan, "ftjob-1", tmp_path, 0).close("finished")  # a late one that never gets to a step
    assert len(lines(tmp_path / "m.jsonl")) == 3
    old.close("finished")
    new.close("finished")


def test_a_run_that_begins_again_begins_a_new_file(tmp_path: Path) -> None:
    path = write(tmp_path, [step(0, valid_loss=1), step(1, loss=1)])
    write(tmp_path, [step(0, valid_loss=2)], resumed_step=0)
    assert [line["valid_loss"] for line in lines(path)] == [2]


def test_a_full_disk_takes_lines_from_the_file_and_not_the_job_whose_log_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = open_logger(make_plan_for(logger=DiskLog(filename="m.jsonl")), "ftjob-1", tmp_path, 0)
    logger.log(step(1, loss=0.5))
    with full_disk(100), caplog.at_level(logging.WARNING, logger="tunewright.train"):  # amid the second line
        for number in range(2, 1000):  # more than a buffer holds
            logger.log(step(number, loss=0.5))
    logger.log(step(1000, loss=0.5))
    logger.close("finished")
    steps = [line["step"] for line in lines(tmp_path / "m.jsonl")]
    assert steps[:3] + steps[-1:] == [1, 2, 3, 1000]
    assert steps == sorted(set(steps))
    (message,) = caplog.messages
    assert str(tmp_path / "m.jsonl") in message


def test_a_run_that_resumes_on_a_full_disk_leaves_the_file_of_its_metrics_as_it_is_until_there_is_room(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, [step(n, loss=n) for n in range(1, 6)])
    logger = open_logger(make_plan_for(logger=DiskLog(filename="m.jsonl")), "ftjob-1", tmp_path, 3)
    with full_disk():
        logger.log(step(4, loss=40))
    assert [line["loss"] for line in lines(path)] == [1, 2, 3, 4, 5]
    logger.log(step(5, loss=50))
    with full_disk():
        logger.log(step(6, loss=60))
        logger.close("finished")
    assert [line["loss"] for line in lines(path)] == [1, 2, 3, 50]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "no WANDB_API_KEY"),
        ({"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "offline"}, "WANDB_MODE is offline"),
        ({"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "disabled"}, "WANDB_MODE is disabled"),
    ],
    ids=["no key", "offline as the operator wants it", "disabled"],
)
def test_wandb_without_a_key_or_a_wish_for_the_server_runs_offline_and_says_how_to_upload(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    environment: dict[str, str],
    reason: str,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, logger="tunewright.train"):
        logger = open_logger(make_plan_for(logger=WandBLog(project="p")), "ftjob-1", tmp_path, 0)
        logger.log(step(1, loss=0.5))
        logger.log(step(1, valid_loss=0.5))
        logger.close("finished")
    run = Path(urlsplit(logger.uri).path)
    assert run.is_relative_to(tmp_path)
    assert run.name.endswith("ftjob-1")
    assert (run / "run-ftjob-1.wandb").stat().st_size > 0
    (message,) = [record.getMessage() for record in caplog.records if record.name == "tunewright.train"]
    assert reason in message
    assert f"wandb sync {run}" in message


def _log_and_be_killed(job_dir: Path) -> None:
    os.environ.pop("WANDB_SERVICE", None)
    os.environ["WANDB_MODE"] = "offline"
    logger = open_logger(make_plan_for(logger=WandBLog(project="p")), "ftjob-1", job_dir, 0)
    for metrics in (step(0, valid_loss=9), step(1, loss=4), step(2, loss=3), step(3, loss=2)):
        logger.log(metrics)
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_offline_wandb_run_that_goes_on_after_a_kill_has_all_steps_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B has not written anything yet when such a short run is killed."""
    killed = get_context("spawn").Process(target=_log_and_be_killed, args=(tmp_path,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    monkeypatch.setenv("WANDB_MODE", "offline")
    sent: list[tuple[int | None, dict[str, Any]]] = []
    monkeypatch.setattr(wandb.Run, "log", lambda _, data, step: sent.append((step, data)))
    for resumed_step in (2, 4):
        sent.clear()
        logger = open_logger(make_plan_for(logger=WandBLog(project="p")), "ftjob-1", tmp_path, resumed_step)
        logger.log(step(resumed_step + 1, loss=1))
        logger.log(step(resumed_step + 2, loss=1))
        logger.close("finished")
    assert [at for at, _ in sent] == [0, 1, 2, 3, 4, 5, 6]
    assert sent[0][1]["valid_loss"] == 9
    assert [data.get("loss") for _, data in sent] == [None, 4, 3, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("end", "heard"),
    [
        ("finished", (0, False)),
        ("failed", (1, False)),
        ("cancelled", (255, False)),
        ("paused", (1, True)),
        ("replaced", (None, False)),
    ],
)
def test_wandb_hears_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: End, heard: tuple[int | None, bool]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = open_logger(make_plan_for(logger=WandBLog(project="p")), "ftjob-1", tmp_path, 0)
    logger.log(step(1, loss=0.5))
    logger.close(end)
    run = Path(urlsplit(logger.uri).path)
    eventually(lambda: end_of(run) == heard, WAIT_S, lambda: f"it has {end_of(run)}")  # W&B's process writes it
    wandb.teardown()


class WandBServer(ThreadingHTTPServer):
    """Accepts every POST until /hang is requested; after that it answers none."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hanging = threading.Event()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandBServer

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.hanging.is_set():
            self.server.over.wait()
            return
        self._answer(json.dumps({"data": {}}).encode())

    def do_GET(self) -> None:
        self.server.hanging.set()
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[WandBServer]:
    server = WandBServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def _log_a_step(server: str, job_dir: Path, init_s: float, meanwhile: str) -> tuple[str, list[str]]:
    """Logs a run to `server`. Returns the logger's URI, and its lines in the job's log. `meanwhile`: the server `hangs`
    or W&B's process `dies` between the start and the first step."""
    os.environ.pop("WANDB_SERVICE", None)  # of a run in the process of the tests, whose W&B this one would join
    os.environ.update(WANDB_BASE_URL=server, WANDB_API_KEY="a" * 40, WANDB_MODE="online")
    loggers.INIT_S, loggers.FINISH_S = init_s, 1.0
    logging.getLogger("tunewright.train").addHandler(messages := Messages())
    logger = open_logger(make_plan_for(logger=WandBLog(project="p", entity="e")), "ftjob-1", job_dir, 0)
    if meanwhile == "hangs":
        urllib.request.urlopen(f"{server}/hang").close()  # noqa: S310  -- the server of this test
    if meanwhile == "dies":
        for process in psutil.Process().children(recursive=True):
            process.kill()
            process.wait()
    logger.log(step(1, loss=0.5))
    logger.log(step(2, loss=0.5))
    logger.close("finished")
    return logger.uri, messages.told


def in_a_fresh_process(*arguments: Any) -> tuple[str, list[str]]:
    """Calls `_log_a_step` in a new process, as W&B keeps the settings that a process began with. It ends like a worker,
    without W&B's telemetry at exit."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_log_a_step, arguments)


def test_a_wandb_server_that_does_not_answer_makes_an_offline_run(tmp_path: Path, server: WandBServer) -> None:
    server.hanging.set()
    uri, (message,) = in_a_fresh_process(server.url, tmp_path, 1.0, "")
    assert uri.startswith(tmp_path.as_uri())
    assert "the server did not accept the run" in message


@pytest.mark.parametrize("meanwhile", ["hangs", "dies"])
def test_what_goes_wrong_with_wandb_while_a_job_trains_neither_ends_nor_delays_it(
    tmp_path: Path, server: WandBServer, meanwhile: str
) -> None:
    """The server doesn't answer any more, or W&B's own process dies."""
    uri, messages = in_a_fresh_process(server.url, tmp_path, 60.0, meanwhile)
    assert uri.startswith(server.url)
    assert messages
    assert all(f"wandb sync {tmp_path}" in message for message in messages)

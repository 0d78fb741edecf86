"""The command line: what it submits, which files it leaves, and how it waits."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from events.actors import StorageMismatchError
from events.decide import Refused
from events.facts import Event, JobCancelled
from events.ids import new_event_id
from events.job import FineTuningJob
from events.log import EventLog, LogUnavailable
from tests.ports import free_ports
from tests.serve_app.live_server import Parts
from tests.waiting import WAIT_S, eventually
from trainers import submit
from trainers.errors import ConfigProblems
from trainers.settings import Settings

ROW = json.dumps({"dialog": [{"role": "assistant", "content": "hi"}]}) + "\n"
CONFIG = {"model": "smollm2-135m-instruct", "data": "rows.jsonl"}
JOB = "ftjob-1"


class Failing:
    """Calls of `inner`, the first of each method failing as those of a restarting actor do: before or, where
    `after_work`, after it has done its work."""

    def __init__(self, inner: Any, *, after_work: bool = False) -> None:
        self._inner = inner
        self._after_work = after_work
        self._failed: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            fails = name not in self._failed
            self._failed.add(name)
            if fails and not self._after_work:
                raise LogUnavailable("restarting")
            answer = await getattr(self._inner, name)(*arguments)
            if fails:
                raise LogUnavailable("no answer in time")
            return answer

        return call


async def begin(service: Any, job_id: str, settings: Settings, **changes: Any) -> bool:
    return await submit.submit(service, job_id, CONFIG | changes, settings, asyncio.Event())


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a service; the working directory, which is no data root, has one file."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rows.jsonl").write_text(ROW)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(submit, "RETRY_S", 0.01)
    return Settings(storage=tmp_path / "storage", max_live_jobs=1)


def test_files_beside_the_config_are_kept_for_a_job_that_is_accepted_and_for_no_other(settings: Settings) -> None:
    async def scenario() -> None:
        service: Any = Parts(settings)
        assert await begin(service, JOB, settings)
        job = await service.log.job(JOB)
        kept = settings.storage / "data" / JOB / "data.jsonl"
        assert job.input_config["data"] == str(kept)
        assert kept.read_text() == ROW
        with pytest.raises(ConfigProblems):
            await begin(service, "ftjob-2", settings, modle=1)
        with pytest.raises(Refused):  # one unfinished job is all that is allowed
            await begin(service, "ftjob-3", settings)
        assert [path.name for path in (settings.storage / "data").iterdir()] == [JOB]

    asyncio.run(scenario())


def test_following_a_job_and_cancelling_it_outlast_a_restart_of_the_log(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> FineTuningJob:
        service: Any = Parts(settings)

        async def append(*events: Event) -> None:
            await service.log.append(JOB, list(events), [new_event_id() for _ in events])

        await begin(service, JOB, settings)
        await service.logs.append(JOB, "worker", 0, [("t", "one")])
        shaky: Any = Parts.__new__(Parts)
        shaky.log, shaky.logs = Failing(service.log), Failing(service.logs)
        cancelled = asyncio.Event()
        cancelled.set()
        await submit.cancel(shaky, JOB, cancelled)
        assert (await service.log.job(JOB)).cancel_requested
        following = asyncio.create_task(submit.follow(shaky, JOB))
        await service.logs.append(JOB, "worker", 1, [("t", "two")])
        await append(JobCancelled())
        await service.logs.wake(JOB)
        job = await following
        await submit.cancel(shaky, JOB, cancelled)  # too late, and no matter
        return job

    assert asyncio.run(scenario()).status == "cancelled"
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_job_is_followed_to_its_end_though_nobody_reads_the_output(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `python -m trainers job.json | head`."""
    reader, writer = os.pipe()
    os.close(reader)

    async def scenario() -> FineTuningJob:
        service: Any = Parts(settings)
        await begin(service, JOB, settings)
        await service.logs.append(JOB, "worker", 0, [("t", "one")])
        following = asyncio.create_task(submit.follow(service, JOB))
        await submit.cancel(service, JOB, asyncio.Event())
        await service.logs.append(JOB, "worker", 1, [("t", "two")])
        await service.log.append(JOB, [JobCancelled()], [new_event_id()])
        await service.logs.wake(JOB)
        return await following

    with os.fdopen(writer, "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        assert asyncio.run(scenario()).status == "cancelled"


@pytest.mark.parametrize("after_work", [False, True], ids=["not written", "written"])
def test_a_submit_whose_answer_does_not_come_is_repeated_and_makes_one_job(
    settings: Settings, after_work: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        service: Any = Parts(settings)
        log = service.log
        service.log = Failing(log, after_work=after_work)
        assert await begin(service, JOB, settings)
        jobs, _ = await log.jobs(10)
        assert [job.job_id for job in jobs] == [JOB]
        assert len(await log.read(JOB)) == 1

    asyncio.run(scenario())
    said = capsys.readouterr().err
    assert said.index(f"submitting {JOB}") < said.index("trying again")


class CommandLine:
    """`submit_and_follow` in this process, in front of parts without a cluster."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = settings
        self.parts: Any = None
        self.log: EventLog
        self.disturb: Callable[[CommandLine], None] = lambda _: None
        monkeypatch.setattr(submit, "start", self._start)
        Path("job.json").write_text(json.dumps(CONFIG))

    def _start(self, settings: Settings) -> Any:
        self.parts = Parts(settings)
        self.log = self.parts.log
        self.disturb(self)
        return self.parts

    def run(self) -> int:
        return submit.submit_and_follow(Path("job.json"), self.settings)


@pytest.fixture
def command_line(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(settings, monkeypatch)


@pytest.mark.parametrize(
    "error", [StorageMismatchError("this cluster keeps its jobs in /a, not in /b"), LogUnavailable("no answer in time")]
)
def test_a_service_that_cannot_be_used_is_reported_and_nothing_is_submitted(
    command_line: CommandLine, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def unusable(_: CommandLine) -> None:
        raise error

    command_line.disturb = unusable
    assert command_line.run() == submit.REFUSED
    assert capsys.readouterr().err == f"tunewright: job.json: nothing was submitted: {error}\n"


def test_a_signal_before_the_submit_leaves_no_job_and_no_file(
    command_line: CommandLine, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line.disturb = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    assert command_line.run() == submit.CANCELLED
    assert "nothing was submitted" in capsys.readouterr().err
    assert not list((settings.storage / "data").iterdir())


def test_a_signal_during_the_submit_cancels_the_job_once_it_is_in_the_log(
    command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    class SignalledLog(Failing):
        """The process is told to end while the answer to its submit does not come; the dispatcher then ends the job
        that is to be cancelled."""

        async def submit(self, *arguments: Any) -> FineTuningJob:
            os.kill(os.getpid(), signal.SIGINT)
            job: FineTuningJob = await super().__getattr__("submit")(*arguments)
            return job

        async def append(self, job_id: str, *arguments: Any) -> FineTuningJob:
            await command_line.log.append(job_id, *arguments)
            return await command_line.log.append(job_id, [JobCancelled()], [new_event_id()])

    def signalled(line: CommandLine) -> None:
        line.parts.log = SignalledLog(line.log, after_work=True)

    command_line.disturb = signalled
    assert command_line.run() == submit.CANCELLED
    said = capsys.readouterr().err
    assert said.index("submitting ftjob-") < said.index("cancelling ftjob-") < said.index(" was cancelled")


class Away:
    """A log that can't be reached, by these methods; `tried` is called each time."""

    def __init__(self, inner: Any, methods: tuple[str, ...], tried: Callable[[], None]) -> None:
        self._inner, self._methods, self._tried = inner, methods, tried

    def __getattr__(self, name: str) -> Any:
        async def call(*_: Any) -> Any:
            self._tried()
            raise LogUnavailable("the disk is full")

        return call if name in self._methods else getattr(self._inner, name)


def test_a_signal_while_the_log_cannot_be_reached_ends_the_submit_with_a_message(
    command_line: CommandLine, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[int] = []

    def tried() -> None:
        tries.append(1)
        if len(tries) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def disturb(line: CommandLine) -> None:
        line.parts.log = Away(line.log, ("submit", "append"), tried)

    command_line.disturb = disturb
    assert command_line.run() == submit.CANCELLED
    assert len(tries) in (4, 5)  # the loop may notice the signal a moment later
    said = capsys.readouterr().err
    [kept] = (settings.storage / "data").iterdir()  # the job may come to need it
    assert f"{kept.name} may have been submitted, and may go on: the disk is full. Once" in said
    assert f"status?job_id={kept.name}" in said


def test_a_job_that_cannot_be_cancelled_is_left_alone_and_a_message_says_so(
    command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    class ReadOnly(Away):
        async def job(self, job_id: str) -> FineTuningJob:
            """Asked while the job is followed."""
            if not tries:
                os.kill(os.getpid(), signal.SIGINT)
            return await command_line.log.job(job_id)

    tries: list[int] = []

    def disturb(line: CommandLine) -> None:
        line.parts.log = ReadOnly(line.log, ("append",), lambda: tries.append(1))

    command_line.disturb = disturb
    assert command_line.run() == submit.CANCELLED
    assert len(tries) == 2
    said = capsys.readouterr().err
    assert said.index(" submitted\n") < said.index("cancelling ftjob-") < said.index("may go on: the disk is full")


STUCK = """
import sys, time
from pathlib import Path
from trainers import submit
from trainers.settings import Settings

def start(settings):
    print("starting", file=sys.stderr, flush=True)
    time.sleep(1000)

submit.start = start
submit.submit_and_follow(Path("job.json"), Settings(storage=Path("storage")))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_whatever_it_waits_for(settings: Settings, number: signal.Signals) -> None:
    Path("job.json").write_text(json.dumps(CONFIG))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", STUCK], env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline() == "starting\n"
            process.send_signal(number)
            assert "a second signal ends this process at once" in process.stderr.readline()

            def ended() -> bool:
                process.send_signal(number)  # again and again: those right after the first are not counted
                return process.poll() is not None

            eventually(ended, WAIT_S, lambda: "it goes on")
            assert process.returncode == -number
        finally:
            process.kill()


def test_a_cluster_that_cannot_be_joined_is_reported() -> None:
    nowhere = {"RAY_ADDRESS": f"127.0.0.1:{free_ports(1)[0]}"}
    command = [sys.executable, "-m", "trainers", "job.json"]
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        command, cwd=root, env=os.environ | nowhere, capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert ran.returncode == submit.REFUSED, ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("tunewright: nothing was submitted: no Ray cluster answers: ")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "[" * 100_000,
        '{"model": "\\ud800',
        '{"lr": 1e-4, "lr": 1e-5}',
        '{"lr": NaN}',
        '{"metadata": ' + "[" * 500 + "]" * 500 + "}",
    ],
)
def test_a_config_that_the_api_would_not_read_is_refused(
    settings: Settings, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("job.json").write_text(text)
    assert submit.read_config(Path("job.json")) is None
    assert "job.json" in capsys.readouterr().err

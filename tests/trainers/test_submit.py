"""The command line's half of a job: what it submits, what it leaves behind, and how it waits."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from events.decide import Refused
from events.facts import Event, JobCancelled
from events.ids import new_event_id
from events.job import FineTuningJob
from events.log import LogUnavailable
from tests.serve_app.live_server import Parts
from trainers import submit
from trainers.errors import ConfigProblems
from trainers.settings import Settings

ROW = json.dumps({"dialog": [{"role": "assistant", "content": "hi"}]}) + "\n"
CONFIG = {"model": "smollm2-135m-instruct", "data": "rows.jsonl"}
JOB = "ftjob-1"


class Failing:
    """Calls of `inner`, the first of each method failing as those of a restarting actor do."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._failed: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if name not in self._failed:
                self._failed.add(name)
                raise LogUnavailable("restarting")
            return await getattr(self._inner, name)(*arguments)

        return call


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
        job = await submit.submit(service, JOB, dict(CONFIG), settings)
        kept = settings.storage / "data" / JOB / "data.jsonl"
        assert job.input_config["data"] == str(kept)
        assert kept.read_text() == ROW
        with pytest.raises(ConfigProblems):
            await submit.submit(service, "ftjob-2", CONFIG | {"modle": 1}, settings)
        with pytest.raises(Refused):  # one unfinished job is all that is allowed
            await submit.submit(service, "ftjob-3", dict(CONFIG), settings)
        assert [path.name for path in (settings.storage / "data").iterdir()] == [JOB]

    asyncio.run(scenario())


def test_following_a_job_and_cancelling_it_outlast_a_restart_of_the_log(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> FineTuningJob:
        service: Any = Parts(settings)

        async def append(*events: Event) -> None:
            await service.log.append(JOB, list(events), [new_event_id() for _ in events])

        await submit.submit(service, JOB, dict(CONFIG), settings)
        await service.logs.append(JOB, "worker", 0, [("t", "one")])
        shaky: Any = Parts.__new__(Parts)
        shaky.log, shaky.logs = Failing(service.log), Failing(service.logs)
        await submit.cancel(shaky, JOB)
        assert (await service.log.job(JOB)).cancel_requested
        following = asyncio.create_task(submit.follow(shaky, JOB))
        await service.logs.append(JOB, "worker", 1, [("t", "two")])
        await append(JobCancelled())
        await service.logs.wake(JOB)
        job = await following
        await submit.cancel(shaky, JOB)  # too late, and no matter
        return job

    assert asyncio.run(scenario()).status == "cancelled"
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"model": "\\ud800'])
def test_a_config_that_is_no_json_object_is_refused(
    settings: Settings, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("job.json").write_text(text)
    assert submit.read_config(Path("job.json")) is None
    assert "job.json" in capsys.readouterr().err

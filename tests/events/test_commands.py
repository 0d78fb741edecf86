"""`python -m events`: looking into a log, checking it, copying it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from events.__main__ import main
from events.actors import Handles, blocking
from events.decide import Refused
from events.ids import new_event_id
from events.log import LogUnavailable
from events.sqlite import SqliteStore
from events.store import Recorded
from tests.events.facts_of_a_job import CANCEL, START, SUBMITTED, VALIDATED
from tests.events.support import add, append, change, opened, submit, write
from tests.ports import free_ports


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a service that does not run."""
    monkeypatch.setenv("TUNEWRIGHT_STORAGE", str(tmp_path))
    write(tmp_path / "events.db")
    return tmp_path / "events.db"


def test_export_writes_every_event_as_a_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["position"], line["job_id"], line["version"]) for line in lines[:4]] == [
        (1, "a", 0),
        (2, "b", 0),
        (3, "c", 0),
        (4, "a", 1),
    ]
    assert len(lines) == 15
    assert lines[0]["event"] == json.loads(SUBMITTED.model_dump_json())
    assert lines[0]["time"] == START.isoformat()


def test_a_storage_that_is_left_empty_is_the_default_as_it_is_for_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TUNEWRIGHT_STORAGE", "")
    assert main(["export"]) == 1
    assert str(tmp_path / ".tunewright" / "events.db") in capsys.readouterr().err


@pytest.mark.parametrize("events", [15, 3000])
def test_export_ends_without_a_word_when_its_reader_has_enough(tmp_path: Path, events: int) -> None:
    """Also if all of the output fits into Python's buffer, which is flushed at exit."""
    file = tmp_path / "events.db"
    write(file, [f"job{number}" for number in range(events // 5)])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "events", "export", "--log", str(file)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as exporting:
        assert exporting.stdout is not None
        exporting.stdout.close()
        _, said = exporting.communicate()
    assert (exporting.returncode, said) == (128 + signal.SIGPIPE, b"")


def test_export_says_what_it_had_to_leave_out(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(file, "UPDATE events SET checksum = 0 WHERE position = 5")
    assert main(["export", "--log", str(file)]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 14
    assert "position 5 of b: its checksum is wrong" in output.err


def test_inspect_shows_a_job_and_its_history(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "b"]) == 0
    shown, _, history = capsys.readouterr().out.partition("\n}\n")
    assert json.loads(shown + "}")["status"] == "running"
    assert [json.loads(line)["event"]["type"] for line in history.splitlines()][-1] == "MetricsRecorded"
    assert main(["inspect", "z"]) == 1
    assert capsys.readouterr().err == f"there is no job z in {file}\n"


def test_verify_says_that_all_is_well_or_what_is_not(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(file)]) == 0
    assert "is sound: 15 events" in capsys.readouterr().err
    change(file, "UPDATE events SET checksum = 0 WHERE position = 5")
    assert main(["verify", str(file)]) == 1
    assert "position 5 of b: its checksum is wrong" in capsys.readouterr().err
    assert main(["verify", str(file.with_name("none.db"))]) == 1
    assert "there is no" in capsys.readouterr().err
    assert not file.with_name("none.db").exists()


def test_a_backup_is_a_log_and_overwrites_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = file.with_name("copy.db")
    assert main(["backup", str(copy)]) == 0
    assert main(["verify", str(copy)]) == 0
    assert main(["backup", str(copy)]) == 1
    assert f"{copy} exists" in capsys.readouterr().err


def test_a_backup_is_made_while_the_log_is_written_and_holds_every_event_up_to_some_moment(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "events.db") as log:
            await log.submit("a", SUBMITTED.model_copy(update={"config": {"model": "x" * 4_000_000}}), "a", 5000)
            copying = asyncio.create_task(log.backup(str(tmp_path / "copy.db")))
            meanwhile = 0
            while not copying.done():
                await submit(log, f"b{meanwhile}", limit=5000)
                meanwhile += 1
            await copying
            assert meanwhile > 0
            await submit(log, "last", limit=5000)
            with closing(SqliteStore(tmp_path / "copy.db")) as copy:
                copied = copy.last_position()
                assert 1 <= copied <= meanwhile + 1
                assert copy.read_all() == await log.subscribe(0, limit=copied)
                assert copy.integrity() == []

    asyncio.run(scenario())


def test_a_backup_that_can_not_be_written_leaves_nothing_and_the_log_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "events.db") as log:
            await submit(log, "a")
            with pytest.raises(LogUnavailable, match="unable to open"):
                await log.backup(str(tmp_path / "nowhere" / "copy.db"))
            await append(log, "a", VALIDATED)

    asyncio.run(scenario())


class Damaged:
    """A service whose log has damaged events, as `python -m events` sees it."""

    def __init__(self, _storage: Path) -> None:
        pass

    def read_all(self, after_position: int) -> list[Recorded]:
        there = [Recorded(at, "a", at, str(at), START, CANCEL) for at in (2, 5)]
        return [recorded for recorded in there if recorded.position > after_position]

    def read_stream(self, job_id: str, _after_version: int) -> list[Recorded]:
        raise Refused("job_damaged", f"the history of job {job_id} is damaged")


def test_what_a_running_service_can_not_read_is_said_as_well(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("events.__main__._Service", Damaged)
    with closing(SqliteStore(file)):
        assert main(["export"]) == 1
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == 2
        assert [line.split(":")[0] for line in said.err.splitlines()] == ["position 1", "position 3", "position 4"]
        assert main(["inspect", "a"]) == 1
        assert capsys.readouterr().err == "the history of job a is damaged\n"


def test_the_log_of_a_running_service_is_asked_through_ray(handles: Handles, tmp_path: Path) -> None:
    blocking(handles.log.submit("a", SUBMITTED, new_event_id(), 100))
    blocking(handles.log.append("a", [CANCEL], [new_event_id()]))

    def events(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "events", *arguments],
            env={**os.environ, "TUNEWRIGHT_STORAGE": str(tmp_path)}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = events("backup", str(tmp_path / "copy.db"))
    assert done.returncode == 0, done.stderr
    with closing(SqliteStore(tmp_path / "copy.db")) as copy:
        assert [one.job_id for one in copy.read_all()] == ["a", "a"]
        add(copy, [("b", "b", SUBMITTED)])
    exported = events("export")
    assert [json.loads(line)["event"]["type"] for line in exported.stdout.splitlines()] == [
        "JobSubmitted",
        "CancelRequested",
    ], exported.stderr
    assert '"cancel_requested": true' in events("inspect", "a").stdout
    assert "is locked" in events("verify", str(tmp_path / "events.db")).stderr


def test_a_cluster_that_does_not_answer_is_given_up_within_seconds(file: Path) -> None:
    (port,) = free_ports(1)
    asked = [sys.executable, "-m", "events", "inspect", "a"]
    with closing(SqliteStore(file)):
        done = subprocess.run(
            asked, env={**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"}, capture_output=True, text=True, check=False,
            timeout=30,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"{file} is in use, and no Ray cluster answers" in done.stderr
    assert "set RAY_ADDRESS to that of the service's cluster, as HOST:PORT" in done.stderr


def test_a_command_without_the_token_that_its_cluster_asks_for_says_so(file: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    with closing(SqliteStore(file)):
        done = subprocess.run(
            [sys.executable, "-m", "events", "inspect", "a"],
            env=env | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"{file} is in use, and no Ray cluster answers" in done.stderr
    assert "no authentication token was found" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("handles")  # the cluster's log is in tmp_path
def test_a_cluster_that_keeps_another_log_is_not_asked_for_this_one(tmp_path: Path) -> None:
    """In a process of its own: joining a cluster sets variables for Ray that the next cluster would use."""
    elsewhere = tmp_path / "elsewhere"
    with closing(SqliteStore(elsewhere / "events.db")):
        done = subprocess.run(
            [sys.executable, "-m", "events", "export"],
            env={**os.environ, "TUNEWRIGHT_STORAGE": str(elsewhere)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        f"{elsewhere}/events.db is in use, and this Ray cluster keeps its jobs in {tmp_path}, not in {elsewhere}: set "
        "TUNEWRIGHT_STORAGE to the former, or RAY_ADDRESS to the cluster of the latter\n"
    )

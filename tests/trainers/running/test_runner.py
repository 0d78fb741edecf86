"""What a runner does before it trains: the data is ready once for all attempts, and the last checkpoint is found."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from events.config import Config
from events.facts import (
    CancelRequested,
    CheckpointSaved,
    DataRejected,
    Event,
    JobAdmitted,
    JobFailed,
    JobSubmitted,
    Resources,
)
from events.ids import new_event_id
from events.job import FineTuningJob
from events.log import EventLog, LogUnavailable
from events.memory import MemoryStore
from tests.events.facts_of_a_job import SUCCEEDED, WORKER_DIED, interrupted, started
from tests.full_disk import full_disk
from tests.small_hub import SmallHub, small_hub
from tests.tiny_models import make_tiny_model
from tests.trainers.data import templates
from tests.trainers.data.support import line
from tests.trainers.job_on_a_log import JOB, JobOnALog
from tests.trainers.world import InMemoryCluster
from trainers.data.dataset import TokenisedDataset
from trainers.data.prepare import DataInvalid
from trainers.dispatching.admission import Capacity, Node
from trainers.errors import CapacityError, UserError
from trainers.models.architecture import inspect_model_dir
from trainers.models.pinned import PinnedModel
from trainers.planning.plan import Plan, make_plan
from trainers.retrying import retrying
from trainers.running.runner import PINNED, _failure, _make_data_ready, _outcome, _record, _success, latest_checkpoint
from trainers.running.tenure import Superseded, Tenure
from trainers.settings import Settings
from trainers.training.reporting import Paused

RESOURCES = Resources(workers=1, nodes=1, cpus_per_worker=1, gpus_per_worker=0)


class Runner:
    """The part of a job's runner that reads its data, on an event log in memory."""

    def __init__(self, root: Path) -> None:
        self.settings = Settings(storage=root / "storage", data_roots=(root,))
        self.model = make_tiny_model(root / "model")
        self.log = EventLog(MemoryStore())
        self.capacity = Capacity(nodes=(Node(4, 0, memory=8 << 30),), free=())
        self.file = root / "rows.jsonl"
        words = ("the children read a story about the sea " * length for length in (1, 40))
        dialogs = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in words]
        self.file.write_text("".join(json.dumps({"dialog": dialog}) + "\n" for dialog in dialogs))

    def submit(self, job_id: str, max_seq_len: int | None = 64, model: str | None = None) -> tuple[FineTuningJob, Plan]:
        config = Config.model_validate(
            {
                "model": model or str(self.model),
                "data": str(self.file),
                "fine_tuning_options": {"extras": {"max_seq_len": max_seq_len}},
            }
        )
        event = JobSubmitted(
            config=config.model_dump(mode="json"), resources=RESOURCES, max_restarts=1, submission_id=job_id
        )
        return retrying(lambda: self.log.submit(job_id, event, new_event_id(), 10)), make_plan(config)

    def make_ready(self, job: FineTuningJob, plan: Plan) -> FineTuningJob:
        return _make_data_ready(
            job, plan, self.model, Tenure(self.log, job.job_id, 0), self.settings, lambda: self.capacity
        )

    def outcome(self, job: FineTuningJob, log: EventLog | None = None) -> Event | None:
        settings = self.settings.model_copy(update={"model_roots": (self.model,)})
        return _outcome(job, log or self.log, Tenure(self.log, job.job_id, 0), settings)

    def data(self, job: FineTuningJob) -> Path:
        return self.settings.job_dir(job.job_id) / "data" / "train"


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_the_report_and_the_log_say_how_many_rows_were_truncated(
    runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="tunewright.runner"):
        job = runner.make_ready(*runner.submit("ftjob-1"))
    assert job.data is not None
    assert (job.data.rows, job.data.truncated_rows) == (2, 1)
    assert "1 rows truncated to 64 tokens" in caplog.text
    assert "extras.max_seq_len" not in caplog.text


def test_the_log_says_what_keeps_more_of_rows_that_the_model_could_take(
    runner: Runner, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.planning.suitability.MAX_SEQ_LEN", 40)
    runner.make_ready(*runner.submit("ftjob-1", max_seq_len=None))
    assert "set extras.max_seq_len to keep up to 512 tokens of each" in caplog.text


def test_the_report_and_the_log_say_of_how_many_rows_an_answer_is_trained_in_part(
    runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    (runner.model / "chat_template.jinja").write_text(templates.R1_DISTILL)
    runner.file.write_text("".join(line("a", f"{answer}\n") + "\n" for answer in ("b", "<think>c</think>d", "d")))
    job = runner.make_ready(*runner.submit("ftjob-1"))
    assert job.data is not None
    assert (job.data.rows, job.data.partly_shown_rows) == (3, 1)
    assert "in 1 of 3 rows the model's chat template shows only part of a message to train on" in caplog.text


def test_the_report_and_the_log_say_how_many_rows_do_not_go_on_from_the_prompt(
    runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    (runner.model / "chat_template.jinja").write_text(templates.QWQ)
    runner.file.write_text("".join(line("a", answer) + "\n" for answer in ("b", "<think>\nc\n</think>d")))
    job = runner.make_ready(*runner.submit("ftjob-1"))
    assert job.data is not None
    assert (job.data.rows, job.data.unprompted_rows) == (2, 1)
    assert "in 1 of 2 rows an answer to train on doesn't continue the model's generation prompt" in caplog.text
    assert r"ends in '<|im_start|>assistant\n<think>\n'" in caplog.text


@pytest.mark.parametrize(("end", "said"), [("", True), ("eos_token", False)])
def test_the_log_says_where_a_model_will_not_learn_to_stop(
    runner: Runner, caplog: pytest.LogCaptureFixture, end: str, said: bool
) -> None:
    (runner.model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ END }}{% endfor %}".replace("END", end or "''")
    )
    runner.make_ready(*runner.submit("ftjob-1"))
    assert ("won't learn to stop" in caplog.text) is said


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_resumed_job_goes_on_with_the_data_it_started_with_and_says_so(
    runner: Runner, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    caplog.set_level(logging.INFO, logger="tunewright.runner")
    job, plan = runner.submit("ftjob-1")
    job = runner.make_ready(job, plan)
    before = [row.tolist() for row in TokenisedDataset(runner.data(job))[0]]
    if change == "gone":
        runner.file.unlink()
    else:
        runner.file.write_text("nope\n")
    assert runner.make_ready(job, plan).data == job.data
    assert [row.tolist() for row in TokenisedDataset(runner.data(job))[0]] == before
    assert caplog.messages[::2] == [
        f"validating {runner.file}",
        f"already validated; going on with the data as it was then: {runner.file}",
    ]


def test_jobs_on_the_same_data_share_its_tokens(runner: Runner) -> None:
    first, second = (runner.make_ready(*runner.submit(job_id)) for job_id in ("ftjob-1", "ftjob-2"))
    assert first.data == second.data
    assert (runner.data(first) / "tokens.bin").samefile(runner.data(second) / "tokens.bin")


def test_bad_data_is_told_with_the_field_and_the_line(
    runner: Runner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f"{runner.file.read_text().splitlines()[0]}\n\nnope\n")
    job, plan = runner.submit("ftjob-1")
    with pytest.raises(DataInvalid) as caught:
        runner.make_ready(job, plan.model_copy(update={"validation_data": str(bad)}))
    error = caught.value.error
    assert (error.code, error.param, error.line, error.fault) == ("invalid_data", "validation_data", 3, "user")
    failed = _failure(job, tmp_path, error, "details", caught.value.report)
    assert isinstance(failed, DataRejected)
    assert failed.data is None
    assert failed.validation_data == caught.value.report
    of_all = "line 3: the line is not JSON"
    assert [record.message for record in caplog.records if record.message.startswith(of_all)]
    assert of_all in (tmp_path / "error.txt").read_text()


def test_a_job_that_no_node_has_the_memory_for_is_refused_before_it_stands_in_line(runner: Runner) -> None:
    runner.capacity = Capacity(nodes=(Node(4, 0, memory=1 << 20),), free=())
    job, plan = runner.submit("ftjob-1")
    with pytest.raises(CapacityError, match="a worker needs about") as caught:
        runner.make_ready(job, plan)
    assert caught.value.error.code == "does_not_fit"
    assert retrying(lambda: runner.log.job("ftjob-1")).status == "validation"


def test_bad_data_ends_a_job_also_where_nothing_can_be_written(runner: Runner, tmp_path: Path) -> None:
    job, _ = runner.submit("ftjob-1")
    (tmp_path / "full").write_text("no directory")
    failed = _failure(job, tmp_path / "full", UserError("data_empty", "it is empty").error, "details")
    assert isinstance(failed, JobFailed)
    assert (failed.error.code, failed.error_path) == ("data_empty", None)


class LogThatIsAway(EventLog):
    async def wait(self, job_id: str, after_version: int, wait_s: float) -> FineTuningJob:
        raise LogUnavailable("no answer in time")


def test_a_runner_that_cannot_reach_the_log_ends_and_does_not_blame_the_job(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.retrying.GIVE_UP_AFTER_S", 0)
    job = runner.make_ready(*runner.submit("ftjob-1"))
    with pytest.raises(LogUnavailable):
        runner.outcome(job, LogThatIsAway(MemoryStore()))
    assert not (runner.settings.job_dir("ftjob-1") / "error.txt").exists()


def test_a_job_that_is_cancelled_as_its_validation_ends_is_not_said_to_have_failed(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class CancelledMeanwhile(InMemoryCluster):
        """Asked for its capacity, which is the last thing before the data is recorded."""

        def capacity(self) -> Capacity:
            retrying(lambda: runner.log.append("ftjob-1", [CancelRequested()], [new_event_id()]))
            return super().capacity()

    monkeypatch.setattr("trainers.running.runner.Cluster", CancelledMeanwhile)
    job, _ = runner.submit("ftjob-1")
    with caplog.at_level(logging.INFO, logger="tunewright.runner"):
        assert runner.outcome(job) is None
    assert caplog.messages[-1] == "this runner ends here: job ftjob-1 is being cancelled"
    assert not (runner.settings.job_dir("ftjob-1") / "error.txt").exists()


@pytest.mark.parametrize(
    ("best", "told"), [(None, ""), (2, ""), (1, "; the one with the lowest validation loss is in {}/step 1/merged")]
)
def test_the_log_of_a_job_that_has_trained_ends_with_that_and_the_place_of_its_model_and_of_a_better_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, best: int | None, told: str
) -> None:
    scene = JobOnALog()
    scene.tell(started(1))
    for number in (1, 2):
        (tmp_path / f"step {number}" / "merged").mkdir(parents=True)
        uri = (tmp_path / f"step {number}").as_uri()
        scene.tell(CheckpointSaved(attempt=1, step=number, epoch=1, uri=uri, best=number == best))
    with caplog.at_level(logging.INFO, logger="tunewright.runner"):
        assert scene.runner().append(_success(scene.job, scene.log, scene.runner())).status == "success"
    assert caplog.messages == [f"training is complete; the model is in {tmp_path}/step 2/merged{told.format(tmp_path)}"]


def test_a_job_that_is_cancelled_right_after_its_training_is_not_said_to_have_succeeded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene = JobOnALog()
    scene.tell(started(1))
    runner = scene.runner()
    with caplog.at_level(logging.INFO, logger="tunewright.runner"):
        outcome = _success(scene.job, scene.log, runner)
        scene.tell(CancelRequested())
        with pytest.raises(Superseded):
            runner.append(outcome)
    assert caplog.messages == ["training is complete"]


def test_only_the_runner_that_ends_a_job_clears_up_after_it(tmp_path: Path) -> None:
    """One that was replaced would delete the checkpoint that is being written now."""
    scene = JobOnALog()
    writing = tmp_path / "checkpoints" / ".step-00000012-attempt-2.draft"
    writing.mkdir(parents=True)
    replaced = scene.runner()
    scene.tell(started(1), interrupted(1), started(2))
    _record(WORKER_DIED, JOB, replaced, tmp_path)
    assert writing.is_dir()
    _record(SUCCEEDED, JOB, scene.runner(), tmp_path)
    assert scene.job.status == "success"
    assert not writing.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"extras": {"optimizer": {"eps": 0}}},
            "fine_tuning_options.extras.optimizer.eps: must be a number greater than 0, not 0",
        ),
        ({"batch_size": -7}, "fine_tuning_options.batch_size: input should be greater than or equal to 1"),
    ],
)
def test_a_job_that_another_version_has_taken_and_this_one_refuses_is_no_bug(
    runner: Runner, options: dict[str, Any], reason: str
) -> None:
    job, _ = runner.submit("ftjob-1")
    config = job.input_config | {"fine_tuning_options": options}
    outcome = runner.outcome(job.model_copy(update={"input_config": config}))
    assert isinstance(outcome, DataRejected)
    assert (outcome.error.code, outcome.error.fault) == ("config_outdated", "user")
    assert outcome.error.message.endswith(f"this one refuses its config: {reason}. Submit it again without that.")


def test_a_job_whose_model_changed_while_it_waited_fails_instead_of_training_on_another(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.retrying.GIVE_UP_AFTER_S", 0)
    job = runner.make_ready(*runner.submit("ftjob-1"))
    settings = runner.settings.model_copy(update={"model_roots": (runner.model,)})
    with pytest.raises(LogUnavailable):
        _outcome(job, LogThatIsAway(MemoryStore()), Tenure(runner.log, "ftjob-1", 0), settings)
    make_tiny_model(runner.model, seed=1)
    outcome = _outcome(job, LogThatIsAway(MemoryStore()), Tenure(runner.log, "ftjob-1", 0), settings)
    assert isinstance(outcome, JobFailed)
    assert (outcome.error.code, outcome.error.fault, outcome.error.param) == ("model_changed", "user", "model")


def test_a_model_that_changes_after_its_job_was_admitted_is_noticed_too(runner: Runner) -> None:
    job = runner.make_ready(*runner.submit("ftjob-1"))
    settings = runner.settings.model_copy(update={"model_roots": (runner.model,)})

    class Admitting(EventLog):
        async def wait(self, job_id: str, after_version: int, wait_s: float) -> FineTuningJob:
            make_tiny_model(runner.model, seed=1)
            return job.model_copy(update={"admitted": True})

    outcome = _outcome(job, Admitting(MemoryStore()), Tenure(runner.log, "ftjob-1", 0), settings)
    assert isinstance(outcome, JobFailed)
    assert outcome.error.code == "model_changed"


def test_a_job_whose_data_finds_no_room_fails_by_the_storage_s_fault(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.running.runner.Cluster", InMemoryCluster)
    job, _ = runner.submit("ftjob-1")
    with full_disk():
        outcome = runner.outcome(job, LogToAdmit(runner.log, 0, lambda: None))
    assert isinstance(outcome, JobFailed)
    assert (outcome.error.code, outcome.error.fault) == ("storage_full", "infrastructure")


def test_a_disk_that_fails_ends_a_job_that_has_done_nothing_yet_and_interrupts_one_whose_data_is_ready(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.running.runner.Cluster", InMemoryCluster)
    job, _ = runner.submit("ftjob-1")
    report = runner.data(job) / "report.json"
    report.parent.mkdir(parents=True)
    report.symlink_to("/proc/self/mem")  # reading it is an EIO
    outcome = runner.outcome(job)
    assert isinstance(outcome, JobFailed)
    assert (outcome.error.code, outcome.error.fault) == ("storage_unreachable", "infrastructure")
    shutil.rmtree(report.parent)
    job = runner.make_ready(*runner.submit("ftjob-2"))
    report = runner.data(job) / "report.json"
    report.unlink()
    report.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        runner.outcome(job)
    assert not (runner.settings.job_dir("ftjob-2") / "error.txt").exists()


class LogToAdmit(EventLog):
    """Of a job that is admitted whenever it waits, `times` in all; then it is away. `before` each something happens."""

    def __init__(self, log: EventLog, times: int, before: Callable[[], None]) -> None:
        super().__init__(MemoryStore())
        self._log, self._times, self._before = log, times, before

    async def job(self, job_id: str) -> FineTuningJob:
        return await self._log.job(job_id)

    async def wait(self, job_id: str, after_version: int, wait_s: float) -> FineTuningJob:
        if self._times == 0:
            raise LogUnavailable("no answer in time")
        self._times -= 1
        self._before()
        return await self._log.append(job_id, [JobAdmitted()], [new_event_id()])


def on_the_hub(runner: Runner) -> tuple[FineTuningJob, Path]:
    """A job on a commit of the hub, its data ready, and the directory that the commit lies in."""
    job, _ = runner.submit("ftjob-1", model="acme/tiny")
    with pytest.raises(LogUnavailable):
        runner.outcome(job, LogToAdmit(runner.log, 0, lambda: None))
    pinned = PinnedModel.model_validate_json((runner.data(job).parent / PINNED).read_bytes())
    return retrying(lambda: runner.log.job("ftjob-1")), pinned.directory


@pytest.fixture
def hub(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    monkeypatch.setattr("trainers.running.runner.Cluster", InMemoryCluster)
    monkeypatch.setattr("trainers.retrying.GIVE_UP_AFTER_S", 0)
    monkeypatch.setattr("trainers.running.runner.MODEL_AWAY_S", 0)
    with small_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add("acme/tiny", runner.model)
        yield hub


def test_a_job_whose_model_was_cleared_from_the_cache_while_it_waited_fetches_it_and_trains(
    runner: Runner, hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def attempt(job: FineTuningJob, plan: Plan, model_dir: Path, settings: Settings, capacity: Capacity) -> None:
        trained.append((plan.model, inspect_model_dir(model_dir).family))
        raise Paused

    monkeypatch.setattr("trainers.running.runner._attempt", attempt)  # it needs Ray
    job, directory = on_the_hub(runner)
    assert runner.outcome(job, LogToAdmit(runner.log, 1, partial(shutil.rmtree, directory))) is None
    assert trained == [(f"acme/tiny@{directory.name}", "llama")]


def test_a_hub_that_is_away_for_a_moment_costs_no_interruption(
    runner: Runner, hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(job: FineTuningJob, plan: Plan, model_dir: Path, settings: Settings, capacity: Capacity) -> None:
        raise Paused

    monkeypatch.setattr("trainers.running.runner._attempt", attempt)  # it needs Ray
    monkeypatch.setattr("trainers.running.runner.MODEL_AWAY_S", 120.0)
    job, directory = on_the_hub(runner)
    happening = iter((True, False))  # as the job is admitted, and in the first pause

    def away_and_back() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        hub.broken = next(happening)

    assert runner.outcome(job, LogToAdmit(runner.log, 2, away_and_back)) is None
    assert retrying(lambda: runner.log.job("ftjob-1")).interruptions == 0
    assert (directory / "config.json").is_file()


def test_a_model_that_can_t_be_read_just_now_sends_its_job_back_to_the_queue(runner: Runner, hub: SmallHub) -> None:
    job, directory = on_the_hub(runner)
    weights = directory / "model.safetensors"

    def fail_to_read() -> None:
        weights.unlink()
        weights.symlink_to("/proc/self/mem")

    with pytest.raises(LogUnavailable):
        runner.outcome(job, LogToAdmit(runner.log, 1, fail_to_read))
    job = retrying(lambda: runner.log.job("ftjob-1"))
    assert (job.status, job.admitted, job.interruptions) == ("queued", False, 1)
    assert job.why is not None
    assert job.why.startswith(f"interrupted: {weights} can't be read: Input/output error")


def test_a_hub_that_is_down_sends_a_job_back_to_the_queue_as_often_as_it_may_be_interrupted(
    runner: Runner, hub: SmallHub
) -> None:
    job, directory = on_the_hub(runner)
    shutil.rmtree(directory)
    hub.broken = True
    outcome = runner.outcome(job, LogToAdmit(runner.log, 5, lambda: None))
    assert isinstance(outcome, JobFailed)
    assert (outcome.error.code, outcome.error.fault) == ("interrupted_too_often", "infrastructure")
    assert "acme/tiny could not be fetched" in outcome.error.message
    assert "that was interruption 2, and --max-restarts is 1" in outcome.error.message
    assert retrying(lambda: runner.log.job("ftjob-1")).interruptions == 2


def job_with(checkpoints: list[Path]) -> FineTuningJob:
    uris = [path.as_uri() for path in checkpoints]
    return FineTuningJob(
        job_id="ftjob-1", created=datetime.now(UTC), status="queued", input_config={}, checkpoints=uris
    )


def test_a_job_goes_on_from_its_newest_checkpoint_that_has_its_training_state(tmp_path: Path) -> None:
    checkpoints = [tmp_path / f"step-{step}" for step in (1, 2, 3)]
    for path in checkpoints:
        path.mkdir()
        if path.name != "step-3":
            (path / "training_state").mkdir()
    assert latest_checkpoint(job_with(checkpoints)) == checkpoints[1]
    assert latest_checkpoint(job_with(checkpoints[2:])) is None


def test_a_checkpoint_is_found_in_a_storage_directory_of_any_name(tmp_path: Path) -> None:
    checkpoint = tmp_path / "100% mine, größer #1?" / "step-1"
    (checkpoint / "training_state").mkdir(parents=True)
    assert latest_checkpoint(job_with([checkpoint])) == checkpoint

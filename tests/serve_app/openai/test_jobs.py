"""Jobs through the real client, in front of a real log; what a runner would record, the tests do."""

import asyncio
import csv
import io
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from events.facts import (
    CancelRequested,
    CheckpointSaved,
    CheckpointsDeleted,
    Event,
    JobCancelled,
    JobError,
    JobFailed,
    JobPaused,
    JobSucceeded,
    MetricsRecorded,
    PauseRequested,
    StepMetrics,
)
from events.store import Recorded
from serve_app.openai import results
from tests.events.facts_of_a_job import ADMITTED, VALIDATED, started
from tests.serve_app.live_server import MODEL, Serve, Server
from tests.serve_app.openai.conftest import ROWS, connected

STEPS = 20


def at(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def evaluated(step: int, loss: float, seconds: float = 0) -> StepMetrics:
    return StepMetrics(step=step, epoch=1, time=at(seconds), valid_loss=loss, valid_token_accuracy=0.25)


def stepped(step: int, loss: float, seconds: float = 0) -> StepMetrics:
    return StepMetrics(step=step, epoch=1, time=at(seconds), loss=loss, lr=1e-4, token_accuracy=0.5)


def running(total_steps: int = STEPS) -> list[Event]:
    return [VALIDATED, ADMITTED, started(1, total_steps=total_steps)]


def saved(step: int) -> CheckpointSaved:
    metrics = {"loss": 2.0, "token_accuracy": 0.5, "valid_loss": float("inf")}
    return CheckpointSaved(attempt=1, step=step, epoch=0, uri=f"file:///step-{step}", metrics=metrics)


def test_a_job_is_what_was_asked_for_and_one_on_both_faces(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 18}}}
    job = create(method=method, suffix="tickets", seed=7, metadata={"team": "a"})
    assert (job.object, job.status, job.seed, job.model) == ("fine_tuning.job", "validating_files", 7, MODEL)
    assert job.id.startswith("ftjob-")
    assert abs(job.created_at - time.time()) < 60
    assert job.hyperparameters.model_dump(exclude_none=True) == {
        "batch_size": 18, "learning_rate_multiplier": 1.0, "n_epochs": 2
    }  # fmt: skip
    hyperparameters = job.method.supervised.hyperparameters
    assert (hyperparameters.n_epochs, hyperparameters.learning_rate_multiplier) == (2, "auto")
    assert (job.metadata, job.result_files, job.error, job.fine_tuned_model) == ({"team": "a"}, [], None, None)
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    ours = httpx.get(f"{server.url}/fine_tuning/jobs/status", params={"job_id": job.id}).json()
    assert ours["input_config"] == {
        "model": MODEL,
        "data": job.training_file,
        "fine_tuning_options": {
            "n_epochs": 2,
            "batch_size": 6,
            "gradient_accumulation_steps": 3,
            "lr": 6e-4,
            "seed": 7,
            "custom_training_options": {"finetuning_type": "lora"},
        },
        "metadata": {"team": "a"},
    }
    assert "openai" not in ours


def test_dpo_and_wandb_and_a_validation_file_mean_what_they_mean_on_our_face(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    valid = client.files.create(file=("v.jsonl", ROWS), purpose="fine-tune")
    hyperparameters = {"beta": 0.3, "learning_rate_multiplier": 2, "n_epochs": "auto", "batch_size": "auto"}
    wandb = {"project": "p", "name": "n", "tags": ["t"]}
    job = create(
        validation_file=valid.id,
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
        integrations=[{"type": "wandb", "wandb": wandb}],
    )
    assert job.validation_file == valid.id
    assert job.method.dpo.hyperparameters.beta == 0.3
    assert job.integrations[0].wandb.project == "p"
    config = server.do(server.parts.log.job(job.id)).input_config
    assert config["logger"] == {"log_type": "wandb", **wandb}
    assert config["fine_tuning_options"]["lr"] == pytest.approx(2e-5)
    assert config["fine_tuning_options"]["extras"]["loss"]["beta"] == 0.3
    assert (config["fine_tuning_options"]["n_epochs"], config["fine_tuning_options"]["batch_size"]) == (3, 4)


def test_a_job_of_our_own_api_is_shown_too(client: openai.OpenAI, server: Server) -> None:
    config = server.config(fine_tuning_options={"n_epochs": 5}, metadata={"ticket": 7})
    job_id = server.submit(**config)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.training_file, job.hyperparameters.n_epochs, job.metadata) == (config["data"], 5, {"ticket": "7"})
    assert client.fine_tuning.jobs.list(limit=1).data[0] == job


def test_the_client_pages_through_all_jobs_and_filters_by_metadata(
    client: openai.OpenAI, create: Callable[..., Any]
) -> None:
    made = [create(metadata={"run": "paging", "n": str(n)} if n else None).id for n in range(5)]
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert listed[:5] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"run": "paging"})] == made[:0:-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"run": "paging", "n": "3"})] == [made[3]]
    without = [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})]
    assert made[0] in without
    assert not set(made[1:]) & set(without)


def status_of(job: FineTuningJob) -> str:
    """The client's types know no `paused`."""
    return job.status


def test_a_job_is_paused_and_resumed(client: openai.OpenAI, server: Server, create: Callable[..., Any]) -> None:
    job = create()
    server.append(job.id, *running())
    assert status_of(client.fine_tuning.jobs.pause(job.id)) == "running"  # to its next checkpoint
    server.append(job.id, JobPaused(attempt=1))
    assert status_of(client.fine_tuning.jobs.retrieve(job.id)) == "paused"
    assert status_of(client.fine_tuning.jobs.pause(job.id)) == "paused"
    assert status_of(client.fine_tuning.jobs.resume(job.id)) == "queued"
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages[:3] == ["Resumed", "The job has stopped at a checkpoint and holds no resources", "Pausing"]


@pytest.mark.parametrize("by", ["shutdown", "node_drain"])
def test_the_events_of_a_job_that_is_paused_for_a_while_say_that_it_goes_on_by_itself(
    client: openai.OpenAI, server: Server, create: Callable[..., Any], by: Any
) -> None:
    job = create()
    server.append(job.id, *running(), PauseRequested(by=by), JobPaused(attempt=1))
    paused, why = client.fine_tuning.jobs.list_events(job.id, limit=2).data
    assert paused.message == "The job has stopped at a checkpoint and holds no resources"
    assert "The job goes on by itself" in why.message
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"


def test_cancel_answers_with_the_job_and_a_finished_one_is_a_conflict_that_is_not_tried_again(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    job = create()
    assert client.fine_tuning.jobs.cancel(job.id).id == job.id
    assert client.fine_tuning.jobs.cancel(job.id).id == job.id
    failed = create()
    error = JobError(code="invalid_data", message="no", param="data", fault="user")
    server.append(failed.id, JobFailed(error=error))
    shown = client.fine_tuning.jobs.retrieve(failed.id)
    assert shown.error is not None
    assert (shown.status, shown.error.code, shown.error.param) == ("failed", "invalid_data", "training_file")
    assert shown.finished_at is not None
    with pytest.raises(openai.ConflictError) as refused:
        client.fine_tuning.jobs.cancel(failed.id)
    assert refused.value.request.headers["x-stainless-retry-count"] == "0"


def test_events_are_newest_first_stable_and_paged(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    job = create()
    steps = [stepped(number, 3.0 / number) for number in range(1, STEPS + 1)]
    batches = [MetricsRecorded(attempt=1, steps=steps[first : first + 6]) for first in range(0, STEPS, 6)]
    server.append(job.id, *running(), MetricsRecorded(attempt=1, steps=[evaluated(0, 4.0)]), *batches, saved(STEPS))
    whole = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    assert whole[-1].message.startswith("Created")
    assert whole[0].message == f"Checkpoint saved at step {STEPS}"
    assert len({event.id for event in whole}) == len(whole) == 2 + 1 + 1 + 1 + STEPS + 1
    for limit in (1, 3, 7):
        assert list(client.fine_tuning.jobs.list_events(job.id, limit=limit)) == whole
    metrics: list[Any] = [event.data for event in whole if event.type == "metrics"]
    assert metrics[0] == {
        "step": STEPS, "total_steps": STEPS, "train_loss": 3.0 / STEPS, "train_mean_token_accuracy": 0.5,
        "valid_loss": None, "valid_mean_token_accuracy": None,
        "full_valid_loss": None, "full_valid_mean_token_accuracy": None,
    }  # fmt: skip
    assert metrics[-1]["full_valid_loss"] == metrics[-1]["valid_loss"] == 4.0
    assert [data["step"] for data in metrics] == list(range(STEPS, -1, -1))


def test_checkpoints_are_those_on_disk_newest_first_and_paged(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    job = create(suffix="s")
    measured = MetricsRecorded(attempt=1, steps=[stepped(1, 2.0)])
    deleted = CheckpointsDeleted(attempt=1, uris=["file:///step-2"])
    server.append(job.id, *running(), measured, saved(1), saved(2), saved(3), deleted, saved(4))
    found = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [checkpoint.step_number for checkpoint in found] == [4, 3, 1]
    assert all(checkpoint.id.startswith("ftckpt_") for checkpoint in found)
    assert found == client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert found[0].fine_tuning_job_id == job.id
    assert (found[0].metrics.train_loss, found[0].metrics.full_valid_loss) == (2.0, None)
    assert found[0].fine_tuned_model_checkpoint.startswith("ft:smollm2-135m-instruct:tunewright:s:")
    shown = client.fine_tuning.jobs.retrieve(job.id).model_dump()
    assert shown["checkpoints"] == ["file:///step-1", "file:///step-3", "file:///step-4"]


def test_the_next_page_of_checkpoints_comes_also_after_one_that_was_deleted_meanwhile(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    job = create()
    server.append(job.id, *running(), saved(1), saved(2), saved(3))
    steps = []
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1):
        steps.append(checkpoint.step_number)
        if checkpoint.step_number == 2:
            server.append(job.id, CheckpointsDeleted(attempt=1, uris=["file:///step-2"]), saved(4))
    assert steps == [3, 2, 1]


def test_the_checkpoints_of_a_long_job_are_listed_without_reading_its_history(
    client: openai.OpenAI, server: Server, create: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, log = create(), server.parts.log
    between = [MetricsRecorded(attempt=1, steps=[stepped(step, 2.0)]) for step in range(1, 300)]
    server.append(job.id, *running(), saved(1), *between, saved(300), *between, saved(600))
    read, events = log.read, []

    async def counted(*arguments: Any) -> list[Recorded]:
        found = await read(*arguments)
        events.extend(found)
        return found

    monkeypatch.setattr(log, "read", counted)
    assert [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(job.id, limit=2)] == [600, 300, 1]
    assert len(events) < 10


def test_a_job_that_is_over_has_a_result_file(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    job = create()
    steps = [evaluated(0, 4.0), stepped(1, 2.0), stepped(2, float("nan")), evaluated(2, 1.5)]
    server.append(job.id, *running(), MetricsRecorded(attempt=1, steps=steps))
    assert client.fine_tuning.jobs.retrieve(job.id).result_files == []
    server.append(job.id, JobSucceeded())
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.trained_tokens) == ("succeeded", 200)
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith("ft:smollm2-135m-instruct:tunewright::")
    (result_file,) = job.result_files
    file = client.files.retrieve(result_file)
    assert (file.purpose, file.filename, file.created_at) == ("fine-tune-results", "step_metrics.csv", job.finished_at)
    assert file in list(client.files.list(limit=1, purpose="fine-tune-results"))
    content = client.files.content(result_file).read()
    assert file.bytes == len(content)
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    assert [(row["step"], row["train_loss"], row["full_valid_loss"]) for row in rows] == [
        ("0", "", "4.0"), ("1", "2.0", ""), ("2", "", "1.5")
    ]  # fmt: skip
    assert rows[1]["train_mean_token_accuracy"] == "0.5"
    with pytest.raises(openai.ConflictError):
        client.files.delete(result_file)
    with pytest.raises(openai.BadRequestError) as refused:  # its purpose is another
        create(training_file=result_file)
    assert (refused.value.param, refused.value.code) == ("training_file", "wrong_purpose")
    ours = httpx.post(f"{server.url}/fine_tuning/jobs/submit", json={"model": MODEL, "data": result_file})
    error = ours.json()["error"]
    assert (ours.status_code, error["param"], error["code"]) == (422, "data", "wrong_purpose")


def test_a_restarted_replica_lists_result_files_without_reading_metrics_again(
    client: openai.OpenAI, server: Server, create: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [create() for _ in range(2)]
    for number, job in enumerate(jobs):
        steps = [stepped(step, 2.0) for step in range(1, 5 + number)]
        server.append(job.id, *running(), MetricsRecorded(attempt=1, steps=steps), JobSucceeded())

    def listed() -> dict[str, int]:
        """The sizes that a replica lists that has just started."""
        results.sizes_in.cache_clear()
        return {file.id: file.bytes for file in client.files.list(purpose="fine-tune-results")}

    before = listed()
    histories: list[str] = []
    log = server.parts.log
    original = log.read

    async def watched(job_id: str, after_version: int = -1, limit: int = 1000) -> list[Recorded]:
        histories.append(job_id)
        return await original(job_id, after_version, limit)

    monkeypatch.setattr(log, "read", watched)
    assert listed() == before
    assert histories == []
    (file,) = server.parts.settings.storage.glob("result-sizes-*")
    lines = file.read_text().splitlines()
    (line,) = [line for line in lines if jobs[1].id in line]
    file.write_text("".join(f"{other}\n" for other in lines if other != line) + line[:-3])  # cut short by a crash
    for read_again in ({jobs[1].id}, set()):
        assert listed() == before
        assert set(histories) == read_again
        histories.clear()
    file.unlink()
    file.mkdir()  # sizes can be neither read nor written
    assert listed() == before


@pytest.mark.parametrize(("every_n_steps", "evaluations"), [(None, 2), (300, 5), (250, 4)])
def test_the_estimated_finish_counts_steps_and_evaluations_that_are_still_to_come(
    client: openai.OpenAI, server: Server, every_n_steps: int | None, evaluations: int
) -> None:
    """An evaluation of 30 s, 1,000 steps of 2 s after a first one of 10 s, another evaluation after each of two epochs
    and every so many steps: known after 5 % of the steps, to a hundredth."""
    options = {"n_epochs": 2, "extras": {"run_val_every_n_steps": every_n_steps}}
    job_id = server.submit(validation_data=server.config()["data"], fine_tuning_options=options)
    server.append(job_id, *running(total_steps=1000))
    assert client.fine_tuning.jobs.retrieve(job_id).estimated_finish is None
    steps = [evaluated(0, 4.0, 30), *(stepped(n, 2.0, 40 + 2 * (n - 1)) for n in range(1, 51))]
    server.append(job_id, MetricsRecorded(attempt=1, steps=steps))
    estimated = client.fine_tuning.jobs.retrieve(job_id).estimated_finish
    assert estimated is not None
    assert estimated - time.time() == pytest.approx(40 + 2 * 999 + evaluations * 30, rel=0.01)
    server.append(job_id, MetricsRecorded(attempt=1, steps=[stepped(1000, 2.0)]), JobSucceeded())
    assert client.fine_tuning.jobs.retrieve(job_id).estimated_finish is None


def test_the_async_client_does_the_same(server: Server, create: Callable[..., Any]) -> None:
    made = create()

    async def journey() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            jobs = client.fine_tuning.jobs
            job = await jobs.create(model=MODEL, training_file=made.training_file)
            assert await jobs.retrieve(job.id) == job
            assert [other.id async for other in jobs.list(limit=1)][:2] == [job.id, made.id]
            assert len([event async for event in jobs.list_events(job.id, limit=1)]) == 2
            assert [checkpoint async for checkpoint in jobs.checkpoints.list(job.id)] == []
            assert (await jobs.cancel(job.id)).id == job.id
            raw = await jobs.with_raw_response.retrieve(job.id)
            assert raw.headers["x-request-id"]

    asyncio.run(journey())


def test_the_same_idempotency_key_makes_one_job(client: openai.OpenAI, create: Callable[..., Any]) -> None:
    made = create()
    again = [
        client.fine_tuning.jobs.create(
            model=MODEL, training_file=made.training_file, extra_headers={"Idempotency-Key": "k"}
        ).id
        for _ in range(2)
    ]
    assert again[0] == again[1] != made.id


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"training_file": "file-" + "0" * 26}, "training_file"),
        ({"training_file": "/etc/passwd"}, "training_file"),
        ({"validation_file": "file-unknown"}, "validation_file"),
        ({"model": ""}, "model"),
        ({"model": "/no/such/model"}, "model"),
        ({"seed": -1}, "seed"),
        ({"suffix": "s" * 65}, "suffix"),
        ({"suffix": "two\nlines"}, "suffix"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "a/b"}}]}, "integrations.0.wandb.project"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
def test_a_wrong_request_is_a_400_that_names_the_field(
    client: openai.OpenAI, create: Callable[..., Any], changes: dict[str, Any], param: str
) -> None:
    before = client.fine_tuning.jobs.list(limit=1).data
    with pytest.raises(openai.BadRequestError) as refused:
        create(**changes)
    assert (refused.value.param or "").startswith(param)
    assert client.fine_tuning.jobs.list(limit=1).data == before


@pytest.mark.parametrize("multiplier", [1e-7, 0.3, 123.456])
def test_a_multiplier_is_shown_as_it_was_asked_for(create: Callable[..., Any], multiplier: float) -> None:
    job = create(hyperparameters={"learning_rate_multiplier": multiplier})
    assert job.hyperparameters.learning_rate_multiplier == multiplier


def test_a_number_that_may_be_auto_is_refused_once_with_both(create: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(hyperparameters={"n_epochs": "many"})
    assert refused.value.message.count("input should be") == 1
    assert "input should be a valid integer, or 'auto'" in refused.value.message
    assert refused.value.param == "hyperparameters.n_epochs"


def test_an_idempotency_key_is_not_for_another_name_of_the_model(
    client: openai.OpenAI, create: Callable[..., Any]
) -> None:
    headers = {"Idempotency-Key": "a name"}
    made = create(suffix="first", extra_headers=headers)
    again = {"model": MODEL, "training_file": made.training_file, "extra_headers": headers}
    assert client.fine_tuning.jobs.create(**again, suffix="first").id == made.id
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(**again, suffix="second")
    assert refused.value.code == "idempotency_key_reused"


def test_a_retry_with_the_key_gets_its_job_also_when_the_file_was_deleted(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    headers = {"Idempotency-Key": "a file that goes"}
    made = create(extra_headers=headers)
    server.append(made.id, CancelRequested(), JobCancelled())
    client.files.delete(made.training_file)
    again = client.fine_tuning.jobs.create(model=MODEL, training_file=made.training_file, extra_headers=headers)
    assert (again.id, again.status) == (made.id, "cancelled")


def test_what_is_wrong_with_an_integration_has_its_name_in_the_request(create: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(integrations=[{"type": "wandb", "wandb": {"project": "p", "name": "n" * 200}}])
    assert refused.value.param == "integrations.0.wandb.name"


def test_a_deleted_file_is_a_400(client: openai.OpenAI, create: Callable[..., Any]) -> None:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    client.files.delete(file.id)
    with pytest.raises(openai.BadRequestError) as refused:
        create(training_file=file.id)
    assert (refused.value.code, refused.value.param) == ("file_not_found", "training_file")


def test_an_unknown_id_or_after_is_a_404_and_a_limit_of_0_a_400(
    client: openai.OpenAI, create: Callable[..., Any]
) -> None:
    job, other = create(), create()
    jobs = client.fine_tuning.jobs
    event = jobs.list_events(other.id).data[0].id
    unknown: list[Callable[[], Any]] = [
        lambda: jobs.retrieve("ftjob-none"),
        lambda: jobs.cancel("ftjob-none"),
        lambda: jobs.list_events("ftjob-none"),
        lambda: jobs.checkpoints.list("ftjob-none"),
        lambda: jobs.list(after="ftjob-none"),
        lambda: jobs.list_events(job.id, after="ftevent-none"),
        lambda: jobs.list_events(job.id, after=event),
        lambda: jobs.list_events(job.id, after=f"ftevent-{job.id[6:]}-0-9"),
        lambda: jobs.checkpoints.list(job.id, after="ftckpt_none"),
        lambda: client.files.list(after="file-none"),
        lambda: client.files.retrieve("file-results-ftjob-none"),
    ]
    for call in unknown:
        with pytest.raises(openai.NotFoundError):
            call()
    for listing in (jobs.list, client.files.list):
        with pytest.raises(openai.BadRequestError) as refused:
            listing(limit=0)
        assert refused.value.param == "limit"
    with pytest.raises(openai.BadRequestError):
        jobs.list_events(job.id, limit=0)
    with pytest.raises(openai.BadRequestError):
        jobs.checkpoints.list(job.id, limit=0)


def test_too_many_jobs_are_told_when_to_come_back(serve: Serve) -> None:
    server = serve(max_live_jobs=1)
    with connected(server) as client:
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
        with pytest.raises(openai.RateLimitError) as refused:
            client.with_options(max_retries=0).fine_tuning.jobs.create(model=MODEL, training_file=file.id)
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert "x-should-retry" not in refused.value.response.headers

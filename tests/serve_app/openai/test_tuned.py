"""Tuned models and checkpoints by their names, and as what further jobs train."""

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest

from events.facts import (
    CheckpointsDeleted,
    JobSucceeded,
)
from tests.serve_app.live_server import MODEL, Server
from tests.tiny_models import make_tiny_model


def test_a_tuned_model_and_a_checkpoint_are_trained_by_the_names_they_are_listed_under(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    first = create(suffix="tickets")
    directories = server.train(first.id, 10, 20)
    make_tiny_model(directories[10])  # all of it was trained
    make_tiny_model(directories[20] / "merged")  # of LoRA
    last, whole = client.fine_tuning.jobs.checkpoints.list(first.id).data
    with pytest.raises(openai.ConflictError, match="once the job has succeeded"):
        create(model=last.fine_tuned_model_checkpoint.removesuffix(":ckpt-step-20"))
    server.append(first.id, JobSucceeded())
    tuned = client.fine_tuning.jobs.retrieve(first.id).fine_tuned_model
    names = {
        tuned: directories[20] / "merged",
        last.id: directories[20] / "merged",
        last.fine_tuned_model_checkpoint: directories[20] / "merged",
        whole.fine_tuned_model_checkpoint: directories[10],
    }
    for name, directory in names.items():
        job = create(model=name)
        assert client.fine_tuning.jobs.retrieve(job.id).model == job.model == name
        ours = httpx.get(f"{server.url}/fine_tuning/jobs/status", params={"job_id": job.id}).json()
        assert ours["input_config"]["model"] == str(directory)
        uri = directories[10 if directory == directories[10] else 20].as_uri()
        assert ours["resubmitted_from"] == {"job_id": first.id, "checkpoint": uri, "base_model": MODEL}
    for name in ("ft:x:tunewright::01ARZ3NDEKTSV4RRFFQ69G5FAV", f"{tuned}:ckpt-step-11"):
        with pytest.raises(openai.NotFoundError) as refused:
            create(model=name)
        assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("suffix", ["team/tickets", "a b:c", "täglich?#%2F", " "])
def test_a_model_is_found_by_its_name_whatever_the_suffix(
    client: openai.OpenAI, server: Server, create: Callable[..., Any], suffix: str
) -> None:
    job = create(suffix=suffix)
    make_tiny_model(server.train(job.id, 10)[10])
    server.append(job.id, JobSucceeded())
    tuned = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert tuned is not None
    assert suffix in tuned
    assert client.models.retrieve(tuned).id == tuned
    assert create(model=tuned).model == tuned
    content = httpx.get(f"{server.url}/v1/fine_tuning/checkpoints/{quote(tuned, safe='')}/content")
    assert content.headers["content-type"] == "application/x-tar"


def test_a_retry_with_the_key_gets_its_job_also_when_the_checkpoint_it_trains_was_deleted(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    first = create()
    (directory,) = server.train(first.id, 10).values()
    make_tiny_model(directory)
    (point,) = client.fine_tuning.jobs.checkpoints.list(first.id).data
    asked = {"training_file": first.training_file, "extra_headers": {"Idempotency-Key": "a checkpoint that goes"}}
    made = client.fine_tuning.jobs.create(model=point.id, **asked)
    server.append(first.id, CheckpointsDeleted(attempt=1, uris=[directory.as_uri()]))
    assert client.fine_tuning.jobs.create(model=point.id, **asked).id == made.id
    with pytest.raises(openai.BadRequestError) as refused:  # though it was the same directory
        client.fine_tuning.jobs.create(model=point.fine_tuned_model_checkpoint, **asked)
    assert refused.value.code == "idempotency_key_reused"
    with pytest.raises(openai.NotFoundError) as gone:
        create(model=point.id)
    assert gone.value.code == "checkpoint_deleted"


def test_a_model_is_named_after_the_base_it_descends_from(
    client: openai.OpenAI, server: Server, create: Callable[..., Any]
) -> None:
    """And a resubmitted job's after the suffix of the job it goes on from."""
    first = create(suffix="tickets")
    make_tiny_model(server.train(first.id, 10)[10] / "merged")
    answer = httpx.post(f"{server.url}/fine_tuning/jobs/resubmit", json={"job_id": first.id})
    again = client.fine_tuning.jobs.retrieve(answer.json()["job_id"])
    assert again.model_dump()["user_provided_suffix"] == "tickets"
    make_tiny_model(server.train(again.id, 10)[10] / "merged")
    (point,) = client.fine_tuning.jobs.checkpoints.list(again.id).data
    assert point.fine_tuned_model_checkpoint.startswith("ft:smollm2-135m-instruct:tunewright:tickets:")
    assert client.models.retrieve(point.fine_tuned_model_checkpoint).owned_by == "tunewright"
    for suffix, named in ((openai.omit, ""), ("mine", "mine")):
        third = create(model=point.fine_tuned_model_checkpoint, suffix=suffix)
        server.train(third.id, 10)
        (its,) = client.fine_tuning.jobs.checkpoints.list(third.id).data
        assert its.fine_tuned_model_checkpoint.startswith(f"ft:smollm2-135m-instruct:tunewright:{named}:")

"""Resolves the names of tuned models and the ids of checkpoints.

A job's model has one name, the `fine_tuned_model` that both APIs show once it has succeeded. Each checkpoint has its
`fine_tuned_model_checkpoint`, and its id.
"""

import asyncio
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from events.decide import Refused
from events.facts import CheckpointSaved, Origin
from events.job import FineTuningJob
from events.store import Recorded
from serve_app.backend import JobLog
from serve_app.errors import Answer, RequestRefused
from serve_app.openai import mapping, results
from trainers.resubmit import model_dir_of, origin_of, step_of

_TUNED = re.compile(r"ft:.*:([0-9A-Za-z]+?)(?::ckpt-step-(\d{1,12}))?")
_CHECKPOINT = re.compile(r"ftckpt_([0-9A-Za-z]+)-(\d{1,12})")


class Checkpoint(NamedTuple):
    """A checkpoint that, by the log, was on disk when it was looked up."""

    job: FineTuningJob
    uri: str

    @property
    def name(self) -> str:
        """For the names of files: the job and the step."""
        return f"{self.job.job_id}-step-{step_of(self.uri)}"


async def with_directory(log: JobLog, config: Mapping[str, Any]) -> tuple[dict[str, Any], Origin | None]:
    """The config of a request, and what its job starts from: if `model` is the name of a tuned model or the id of a
    checkpoint, the config has the model's directory instead. None: it is the name of another model.

    Raises RequestRefused as `checkpoint_of` does, and where the directory is no longer there.
    """
    name = config.get("model")
    tuned = await checkpoint_of(log, name) if isinstance(name, str) else None
    if tuned is None:
        return dict(config), None
    return {**config, "model": await directory_of(tuned)}, origin_of(tuned.job, tuned.uri)


async def directory_of(found: Checkpoint) -> str:
    """The directory of its model; for an adapter, of the merged model. Raises RequestRefused if it is gone."""
    return await asyncio.to_thread(_directory, found)


async def checkpoint_of(log: JobLog, name: str) -> Checkpoint | None:
    """The checkpoint that `name` stands for: the name of a tuned model, or the id of a checkpoint. None for any other
    name.

    Raises RequestRefused: 404 if there is no such job or checkpoint, 409 if the job has not succeeded yet.
    """
    if (of_id := _CHECKPOINT.fullmatch(name)) is not None:
        return await _by_id(log, name, of_id[1], int(of_id[2]))
    if (of_name := _TUNED.fullmatch(name)) is None:
        return None
    job = await _job(log, of_name[1])
    step = None if of_name[2] is None else int(of_name[2])
    if job is None or mapping.model_name(job, step) != name:
        raise unknown_model(f"there is no tuned model {name[:300]!a}; GET /v1/models lists all models")
    if step is not None:
        uris = [uri for uri in job.checkpoints if step_of(uri) == step]
        if not uris:
            raise await _no_checkpoint(log, job, step)
        return Checkpoint(job, uris[-1])
    if job.status != "success":
        message = (
            f"job {job.job_id} is {mapping.status_of(job)}: its model exists under this name once the job has succeeded"
        )
        if job.checkpoints:
            message += f"; the last checkpoint is {mapping.model_name(job, step_of(job.checkpoints[-1]))}"
        raise RequestRefused(Answer(409, "conflict_error", "job_not_succeeded", message, "model"))
    if not job.checkpoints:
        raise unknown_model(f"job {job.job_id} has kept no checkpoint")
    return Checkpoint(job, job.checkpoints[-1])


def _directory(found: Checkpoint) -> str:
    directory = model_dir_of(found.uri)
    if not directory.is_dir():
        raise unknown_model(f"{found.name} is no longer in the storage directory", "checkpoint_deleted")
    return str(directory)


def unknown_model(message: str, code: str = "model_not_found") -> RequestRefused:
    return RequestRefused(Answer(404, "not_found_error", code, message, "model"))


async def _no_checkpoint(log: JobLog, job: FineTuningJob, step: int) -> RequestRefused:
    async for recorded in results.history(log, job.job_id):
        if isinstance(recorded.event, CheckpointSaved) and recorded.event.step == step:
            return unknown_model(f"job {job.job_id} has deleted its checkpoint of step {step}", "checkpoint_deleted")
    return unknown_model(f"job {job.job_id} has no checkpoint of step {step}")


async def _by_id(log: JobLog, name: str, ulid: str, version: int) -> Checkpoint:
    job = await _job(log, ulid)
    found = None if job is None else await saved_at(log, job.job_id, version)
    if job is None or found is None:
        raise unknown_model(f"there is no checkpoint {name}")
    if found[1].uri not in job.checkpoints:
        raise unknown_model(f"job {job.job_id} has deleted checkpoint {name}", "checkpoint_deleted")
    return Checkpoint(job, found[1].uri)


async def saved_as(log: JobLog, job_id: str, checkpoint_id: str) -> tuple[Recorded, CheckpointSaved] | None:
    """The event that saved the job's checkpoint of that id; None if there is none. It may have been deleted since."""
    named = _CHECKPOINT.fullmatch(checkpoint_id)
    if named is None or f"ftjob-{named[1]}" != job_id:
        return None
    return await saved_at(log, job_id, int(named[2]))


async def saved_at(log: JobLog, job_id: str, version: int) -> tuple[Recorded, CheckpointSaved] | None:
    """The event of that version, if it saved a checkpoint."""
    for recorded in await log.read(job_id, version - 1, 1):
        if recorded.version == version and isinstance(recorded.event, CheckpointSaved):
            return recorded, recorded.event
    return None


async def _job(log: JobLog, ulid: str) -> FineTuningJob | None:
    try:
        return await log.job(f"ftjob-{ulid}")
    except Refused as refused:
        if refused.code == "unknown_job":
            return None
        raise

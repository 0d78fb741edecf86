"""Translates OpenAI's requests for jobs into our Config, and our jobs into OpenAI's objects."""

import json
import time
from functools import lru_cache
from typing import Any, Literal

from events.config import Config
from events.facts import CheckpointSaved, Defaults
from events.job import FineTuningJob, Status
from events.store import Recorded
from serve_app.openai import results
from serve_app.openai.objects import (
    JobStatus,
    OpenAICheckpoint,
    OpenAIDpoHyperparameters,
    OpenAIError,
    OpenAIHyperparameters,
    OpenAIJob,
    OpenAIJobRequest,
)
from serve_app.pace import evaluations_after
from trainers.errors import ConfigProblems, Problem
from trainers.planning.components import DPO_LOSS
from trainers.planning.plan import DEFAULT_DPO_LR, DEFAULT_GROUPS, DEFAULT_LR, DEFAULT_ROWS, Plan, WandBLog, make_plan

EPOCHS, BETA = 3, 0.1
BATCH = {"supervised": DEFAULT_ROWS, "dpo": DEFAULT_GROUPS}
"""Rows (pairs, with DPO) in a batch with `auto`, and at most in a micro-batch: larger batches are accumulated."""
RATE = {"supervised": DEFAULT_LR["lora"], "dpo": DEFAULT_DPO_LR["lora"]}
"""The learning rate with a learning_rate_multiplier of 1."""
_STATUS: dict[Status, JobStatus] = {
    "validation": "validating_files",
    "queued": "queued",
    "running": "running",
    "success": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
_OPENAI_NAMES = {
    "data": "training_file",
    "validation_data": "validation_file",
    "fine_tuning_options.n_epochs": "hyperparameters.n_epochs",
    "fine_tuning_options.batch_size": "hyperparameters.batch_size",
    "fine_tuning_options.lr": "hyperparameters.learning_rate_multiplier",
}
_WANDB, _OUR_WANDB = "integrations.0.wandb.", "logger."


def config_of(asked: OpenAIJobRequest) -> dict[str, Any]:
    """The same request as a body of POST /fine_tuning/jobs/submit. Raises ConfigProblems."""
    kind, chosen = _method(asked)
    beta = getattr(chosen, "beta", "auto")
    batch = BATCH[kind] if chosen.batch_size == "auto" else chosen.batch_size
    micro = next(size for size in range(BATCH[kind], 0, -1) if batch % size == 0)
    multiplier = 1.0 if chosen.learning_rate_multiplier == "auto" else chosen.learning_rate_multiplier
    options: dict[str, Any] = {
        "n_epochs": EPOCHS if chosen.n_epochs == "auto" else chosen.n_epochs,
        "batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "lr": multiplier * RATE[kind],
        "custom_training_options": {"finetuning_type": "lora"},
    }
    if asked.seed is not None:
        options["seed"] = asked.seed
    if kind == "dpo":
        options["extras"] = {"loss": {"_component_": DPO_LOSS, "beta": BETA if beta == "auto" else beta}}
    config: dict[str, Any] = {"model": asked.model, "data": asked.training_file, "fine_tuning_options": options}
    if asked.validation_file is not None:
        config["validation_data"] = asked.validation_file
    if asked.integrations:
        config["logger"] = {"log_type": "wandb", **asked.integrations[0].wandb.model_dump(exclude_none=True)}
    if asked.metadata:
        config["metadata"] = asked.metadata
    return config


def _method(asked: OpenAIJobRequest) -> tuple[Literal["supervised", "dpo"], OpenAIHyperparameters]:
    """The method and its hyperparameters, from either place. Raises ConfigProblems for contradictions."""
    kind = asked.method.type if asked.method else "supervised"
    given = {name: getattr(asked.method, name) for name in ("supervised", "dpo")} if asked.method else {}
    problems = [
        Problem(f"method.{name}", f"needs type {name!r}, and the type is {kind!r}")
        for name, part in given.items()
        if part is not None and name != kind
    ]
    chosen = getattr(given.get(kind), "hyperparameters", None)
    if chosen is not None and asked.hyperparameters is not None:
        problems.append(Problem("hyperparameters", f"are given in method.{kind} as well: send only one of the two"))
    if problems:
        raise ConfigProblems(problems)
    defaults = OpenAIDpoHyperparameters() if kind == "dpo" else OpenAIHyperparameters()
    return kind, chosen or asked.hyperparameters or defaults


def in_openai_words(problem: Problem) -> Problem:
    """The problem, with its field named as in OpenAI's request."""
    name = problem.param or ""
    if name.startswith(_OUR_WANDB):
        return problem._replace(param=_WANDB + name.removeprefix(_OUR_WANDB))
    return problem._replace(param=_OPENAI_NAMES.get(name, problem.param))


def shown(job: FineTuningJob) -> OpenAIJob:
    """The job as OpenAI's object."""
    said = job.openai or {}
    # Metadata doesn't change the plan, and may be as large as a request: it would be part of each key of the cache.
    config = {name: value for name, value in job.input_config.items() if name != "metadata"}
    plan = _plan(json.dumps(config), job.defaults)
    kind: Literal["supervised", "dpo"] = "dpo" if plan is not None and plan.pairs else "supervised"
    hyperparameters = _hyperparameters(plan, kind)
    method = {"type": kind, kind: {"hyperparameters": hyperparameters}}
    logger = plan.logger if plan else None
    derived = [{"type": "wandb", "wandb": logger.model_dump(exclude={"kind"})}] if isinstance(logger, WandBLog) else []
    succeeded = job.status == "success"
    named = job.resubmitted_from.model if job.resubmitted_from else None
    return OpenAIJob(
        id=job.job_id,
        created_at=int(job.created.timestamp()),
        error=_error(job),
        estimated_finish=estimated_finish(job, plan, time.time()),
        fine_tuned_model=model_name(job) if succeeded else None,
        finished_at=int(job.finished_at.timestamp()) if job.finished_at else None,
        hyperparameters={name: value for name, value in hyperparameters.items() if name != "beta"},
        integrations=said.get("integrations", derived),
        metadata=metadata_of(job) or None,
        method=said.get("method", method),
        model=said.get("model") or named or str(job.input_config.get("model", "")),
        result_files=[results.file_id(job.job_id)] if results.has_results(job) else [],
        seed=plan.seed if plan else 0,
        status=status_of(job),
        trained_tokens=_trained_tokens(job) if succeeded else None,
        training_file=str(job.input_config.get("data", "")),
        validation_file=job.input_config.get("validation_data"),
        user_provided_suffix=job.suffix,
        checkpoints=job.checkpoints,
    )


def status_of(job: FineTuningJob) -> JobStatus:
    return "paused" if job.paused else _STATUS[job.status]


def metadata_of(job: FineTuningJob) -> dict[str, str]:
    """The job's metadata. Values that are not strings, which only our own API takes, are written as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in job.metadata.items()}


def model_name(job: FineTuningJob, step: int | None = None) -> str:
    """The name of the job's model, or of its checkpoint at `step`, in OpenAI's form:
    `ft:<base>:<organisation>:<suffix>:<id>[:ckpt-step-<step>]`."""
    base = job.base_model.rstrip("/").rpartition("/")[2].replace(":", "-")
    name = f"ft:{base}:tunewright:{job.suffix or ''}:{job.job_id.removeprefix('ftjob-')}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def checkpoint(job: FineTuningJob, recorded: Recorded, event: CheckpointSaved) -> OpenAICheckpoint:
    names = results.TRAIN | results.VALID
    metrics: dict[str, int | float | None] = {"step": event.step}
    metrics |= {name: results.finite(event.metrics.get(ours)) for name, ours in names.items()}
    return OpenAICheckpoint(
        id=f"ftckpt_{job.job_id.removeprefix('ftjob-')}-{recorded.version}",
        created_at=int(recorded.time.timestamp()),
        fine_tuned_model_checkpoint=model_name(job, event.step),
        fine_tuning_job_id=job.job_id,
        metrics=metrics,
        step_number=event.step,
        uri=event.uri,
    )


def estimated_finish(job: FineTuningJob, plan: Plan | None, now: float) -> int | None:
    """In Unix seconds, from the duration of the run's steps and evaluations so far; None unless the job is training."""
    progress, pace = job.progress, job.pace
    if job.status != "running" or job.cancel_requested or progress is None or pace is None:
        return None
    done, total = progress.step, progress.total_steps
    every_n_steps = plan.run_val_every_n_steps if plan else None
    remaining = pace.remaining_s(total - done, evaluations_after(done, total, progress.n_epochs, every_n_steps))
    return None if remaining is None else int(max(pace.at.timestamp() + remaining, now))


def _error(job: FineTuningJob) -> OpenAIError | None:
    if job.error is None:
        return None
    param = in_openai_words(Problem(job.error.param, "")).param
    return OpenAIError(code=job.error.code, message=job.error.message, param=param)


def _trained_tokens(job: FineTuningJob) -> int | None:
    """All tokens of the data, in every epoch, as OpenAI counts them."""
    return job.data.tokens * job.progress.n_epochs if job.data and job.progress else None


def _hyperparameters(plan: Plan | None, kind: Literal["supervised", "dpo"]) -> dict[str, Any]:
    if plan is None:
        return {}
    chosen = {
        "batch_size": plan.batch_size * plan.gradient_accumulation_steps * plan.workers,
        "learning_rate_multiplier": float(f"{plan.lr / RATE[kind]:.6g}"),
        "n_epochs": plan.n_epochs,
    }
    return chosen | ({"beta": plan.loss.kwargs.get("beta", BETA)} if kind == "dpo" else {})


@lru_cache(4096)
def _plan(config: str, defaults: Defaults | None) -> Plan | None:
    """The plan; None if the config is from another version of the service and not valid in this one."""
    try:
        return make_plan(Config.model_validate_json(config), defaults)
    except (ConfigProblems, ValueError):
        return None

"""Makes a new job from a checkpoint of an old one: the old config with changes, and the checkpoint as its model.

The new job takes only the weights of the checkpoint: optimizer, schedule and data start from the beginning. With
adapters it takes the merged model, so any method may follow any other.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from events.facts import Origin
from events.job import FineTuningJob
from events.jobs import same_request
from trainers.errors import Problem
from trainers.planning.merge import canonical_keys
from trainers.planning.overrides import PARAM as OVERRIDES
from trainers.planning.overrides import parse_overrides
from trainers.planning.plan import EXTRAS
from trainers.planning.preflight import without_nulls

_TAGS = ("finetuning_type", "log_type")
_STEP = re.compile(r"step-0*(\d+)(?:-attempt-\d+)?/?$")


class Resubmission(NamedTuple):
    """`document` is the new request, not yet examined. `origin` is None if there is no such checkpoint; `problems` then
    say so."""

    document: dict[str, Any]
    origin: Origin | None
    problems: list[Problem]


def resubmission(job: FineTuningJob, checkpoint: str | int | None, changes: Mapping[str, Any]) -> Resubmission:
    """The request for a new job from a checkpoint of `job`. `checkpoint` is one of the URIs in `job.checkpoints`, or
    the step that it was written after; None: the last one.

    `changes` are merged into the job's config as in RFC 7396: objects are merged, null removes a field. But an object
    whose `finetuning_type` or `log_type` changes is replaced, as its other fields belong to the old kind.
    """
    problems = []
    if "model" in changes:
        problems.append(
            Problem(
                "config.model", "the checkpoint is the model; to train another model, submit a new job", "not_allowed"
            )
        )
    document = _merged(job.input_config, {key: value for key, value in changes.items() if key != "model"})
    problems += _without_effect(changes, document)
    chosen = _chosen(job, checkpoint)
    if isinstance(chosen, Problem):
        return Resubmission(document, None, [*problems, chosen])
    document["model"] = str(model_dir_of(chosen))
    return Resubmission(document, origin_of(job, chosen).model_copy(update={"suffix": job.suffix}), problems)


def origin_of(job: FineTuningJob, checkpoint: str) -> Origin:
    """The origin that a new job from this checkpoint of `job` records."""
    return Origin(job_id=job.job_id, checkpoint=checkpoint, base_model=job.base_model)


def is_repeated(
    made: FineTuningJob, job: FineTuningJob, checkpoint: str | int | None, changes: Mapping[str, Any]
) -> bool:
    """Whether the same resubmission of `job` made the job `made` before. Its checkpoint may have been deleted since,
    and if none was named, there may be a later one by now."""
    origin = made.resubmitted_from
    if origin is None or origin.job_id != job.job_id or "model" in changes:
        return False
    document = _merged(job.input_config, changes) | {"model": made.input_config["model"]}
    named = checkpoint is None or checkpoint in (origin.checkpoint, step_of(origin.checkpoint))
    return named and same_request(made, without_nulls(document), None)


def problem_of_resubmission(problem: Problem) -> Problem:
    """Renames the field of a problem of `Resubmission.document` to that of the resubmit request."""
    if problem.param is None:
        return problem
    return problem._replace(param="checkpoint" if problem.param == "model" else f"config.{problem.param}")


def _chosen(job: FineTuningJob, wanted: str | int | None) -> str | Problem:
    """The URI of the checkpoint, or why there is none."""
    if not job.checkpoints:
        return Problem("checkpoint", f"job {job.job_id} has no checkpoint", "no_checkpoint")
    if wanted is None:
        found = job.checkpoints[-1:]
    elif isinstance(wanted, int):
        found = [uri for uri in job.checkpoints if step_of(uri) == wanted]
    else:
        found = [uri for uri in job.checkpoints if uri == wanted]
    if not found:
        steps = ", ".join(str(step_of(uri)) for uri in job.checkpoints)
        message = f"job {job.job_id} has no such checkpoint, or deleted it; it has those of the steps {steps}"
        return Problem("checkpoint", message, "checkpoint_not_found")
    if not model_dir_of(found[0]).is_dir():
        return Problem("checkpoint", "it is no longer in the storage directory", "checkpoint_not_found")
    return found[0]


def step_of(uri: str) -> int | None:
    """The step that the checkpoint was written after; None if the URI doesn't tell."""
    match = _STEP.search(uri)
    return None if match is None else int(match[1])


def model_dir_of(uri: str) -> Path:
    """Directory of a checkpoint's model; with adapters, of the merged one. It may not exist any more."""
    path = Path(unquote(urlsplit(uri).path))
    merged = path / "merged"
    return merged if merged.is_dir() else path


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, change in changes.items():
        before = merged.get(key)
        if change is None:
            merged.pop(key, None)
        elif isinstance(change, dict) and isinstance(before, dict) and not _another_kind(before, change):
            merged[key] = _merged(before, change)
        else:
            merged[key] = change
    return merged


def _without_effect(changes: Mapping[str, Any], document: Mapping[str, Any]) -> list[Problem]:
    """A problem for each setting in `changes` that the earlier job also sets in a place that takes precedence; for none
    that `changes` remove."""
    changed, all_places = _settings(changes), _settings(document)
    problems = []
    for number, place in enumerate(changed):
        for key, param in place.items():
            for later, still in zip(changed[number + 1 :], all_places[number + 1 :], strict=True):
                if key in still and key not in later:
                    message = (
                        f"has no effect, as the earlier job's {still[key]} sets {key}, too: change it there, or take "
                        "it out there"
                    )
                    problems.append(Problem(f"config.{param}", message, "duplicate_key"))
    return problems


def _settings(config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The settings in `fine_tuning_options`, `overrides` and `extras`, in the order of `make_plan`: by their canonical
    names, each with its field. What has the wrong type is left out; the examination of the config refuses it later."""
    options = _object(config.get("fine_tuning_options"))
    custom = "custom_training_options"
    fields = {key: f"fine_tuning_options.{key}" for key, value in options.items() if value is not None}
    of_method = _object(options.get(custom))
    fields |= {key: f"fine_tuning_options.{custom}.{key}" for key, value in of_method.items() if value is not None}
    text = config.get("overrides")
    overrides = parse_overrides(text)[0].settings if isinstance(text, str) else []
    return (
        fields,
        dict.fromkeys(canonical_keys(overrides), OVERRIDES),
        {key: f"{EXTRAS}.{spelled}" for key, spelled in canonical_keys(_object(options.get("extras")).items()).items()},
    )


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _another_kind(before: Mapping[str, Any], change: Mapping[str, Any]) -> bool:
    return any(_kind(before.get(tag)) != _kind(change[tag]) for tag in _TAGS if tag in before and tag in change)


def _kind(tag: object) -> str:
    """One name for both spellings of a tag, such as `lora` and `LoraFineTuneOptions`."""
    return str(tag).lower().removesuffix("finetuneoptions").removesuffix("logger")

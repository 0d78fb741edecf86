"""Checks a request before it becomes a job, and reports every problem at once.

It reads no tensors and no data, and downloads nothing: what takes longer than a few milliseconds is left to the job's
own validation.
"""

import copy
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from events.config import (
    Config,
    DiskLogger,
    FineTuningOptions,
    FullFineTuneOptions,
    LoraFineTuneOptions,
    WandBLogger,
)
from events.ids import is_job_id
from trainers.data.source import check_data_uri
from trainers.errors import MOST_PROBLEMS, ConfigProblems, Problem, UserError
from trainers.files import PURPOSE, RESULTS_PREFIX, RESULTS_PURPOSE, file_store, is_file_id
from trainers.models.architecture import Architecture, inspect_model_dir
from trainers.models.names import classify_model, local_directory
from trainers.planning.components import SECTIONS
from trainers.planning.keys import BY_NAME
from trainers.planning.plan import EXTRAS, Plan, make_plan
from trainers.planning.suitability import check_suitable
from trainers.settings import Settings

_CUSTOM = "fine_tuning_options.custom_training_options"
_Homes = Mapping[str, tuple[type[BaseModel], ...]]
_HOMES: _Homes = {
    "": (Config,),
    "fine_tuning_options": (FineTuningOptions,),
    _CUSTOM: (LoraFineTuneOptions, FullFineTuneOptions),
    "logger": (DiskLogger, WandBLogger),
}
_MEMBERS: Mapping[str, tuple[type[BaseModel], str]] = {
    "FullFineTuneOptions": (FullFineTuneOptions, "finetuning_type 'full'"),
    "LoraFineTuneOptions": (LoraFineTuneOptions, "finetuning_type 'lora'"),
    "DiskLogger": (DiskLogger, "log_type 'disk'"),
    "WandBLogger": (WandBLogger, "log_type 'wandb'"),
}
"""The members of unions by their tags in pydantic's error locations; with each, the field and value that select it."""
_SCALARS = {"constrained-str", "constrained-int", "constrained-float", "str", "int", "float", "none"}
_NOT_A_PATH = (OSError, ValueError, RuntimeError)  # a name too long, a loop of links, a broken URI, `~nobody`
_OPAQUE = ("metadata", "extras")  # their content is the user's: nulls in it are kept


class Examined(NamedTuple):
    """A request, its plan, and everything that is wrong with it. `plan` is None if no plan can be made; `architecture`
    is None if the model isn't a local directory, or can't be used."""

    document: dict[str, Any]
    plan: Plan | None
    architecture: Architecture | None
    problems: list[Problem]


def examine(document: Mapping[str, Any], settings: Settings) -> Examined:
    """Check a request. `document` is its JSON, parsed but not validated. Blocks on file look-ups.

    A null field counts as absent, and is left out of `Examined.document`.
    """
    sent = without_nulls(document)
    try:
        config = Config.model_validate(sent)
    except ValidationError as error:
        errors = error.errors(include_input=False, include_url=False)
        return Examined(sent, None, None, problems_of(errors) + _beyond(sent, errors, settings))
    return _examine(sent, config, settings)


def problems_of(errors: Sequence[Mapping[str, Any]], body: type[BaseModel] = Config) -> list[Problem]:
    """Pydantic's validation errors of the model `body` as Problems. None of them repeats a value that was sent."""
    # An optional field is a union with None. Messages don't suggest null; the error of the other member is kept.
    told = [detail for detail in errors if detail["type"] != "none_required"]
    homes = _HOMES if body is Config else {"": (body,)}
    alternatives = {_path(detail): detail for detail in told if _is_alternative(detail)}
    told = [detail for detail in told if not _is_alternative(detail)]
    told = list({_path(detail): detail for detail in reversed(told)}.values())[::-1]  # one error per field
    problems = [_problem(detail, homes, alternatives.get(_path(detail))) for detail in told[:MOST_PROBLEMS]]
    if len(told) > MOST_PROBLEMS:
        problems.append(Problem(None, f"and {len(told) - MOST_PROBLEMS} more problems", "more_problems"))
    return problems


def _is_alternative(detail: Mapping[str, Any]) -> bool:
    """Whether this is the error of the literal in a union like `int | Literal["auto"]`."""
    return detail["type"] == "literal_error" and str(detail["loc"][-1]).startswith("literal[")


def _problem(detail: Mapping[str, Any], homes: _Homes, alternative: Mapping[str, Any] | None) -> Problem:
    path = _path(detail)
    param = ".".join(str(part) for part in path) or None
    match detail["type"]:
        case "missing":
            return Problem(param, "is required", "missing")
        case "extra_forbidden":
            return Problem(param, _unknown_field(detail, homes), "unknown_field")
        case "model_type" | "dict_type":  # pydantic's own message speaks of Python's types
            return Problem(param, "input should be an object", str(detail["type"]))
    message = str(detail["msg"]).removeprefix("Value error, ")
    if alternative is not None:
        message += f", or {alternative['ctx']['expected']}"
    return Problem(param, message[:1].lower() + message[1:], str(detail["type"]))


def _path(detail: Mapping[str, Any]) -> tuple[str | int, ...]:
    """The field's path in the request: pydantic's location without the tags of unions."""
    loc = tuple(detail["loc"])
    if loc[:1] == ("metadata",):  # the user's own keys follow, which may look like tags
        return loc
    if detail["type"] == "extra_forbidden":  # the last part is the user's key
        return (*_without_tags(loc[:-1]), loc[-1])
    path = _without_tags(loc)
    of_union = path and (path[-1] in _SCALARS or _is_alternative(detail))
    return path[:-1] if len(path) > 1 and of_union else path


def _without_tags(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    return tuple(part for part in loc if part not in _MEMBERS)


def _unknown_field(detail: Mapping[str, Any], homes: _Homes) -> str:
    """The message about an unknown field: where it belongs, or which field may have been meant."""
    *before, name = (str(part) for part in _path(detail))
    parent, ours = ".".join(before), homes is _HOMES
    chosen = next((_MEMBERS[part] for part in detail["loc"][:-1] if part in _MEMBERS), None)
    here = homes.get(parent, ())
    known = [field for model in here if chosen is None or model is chosen[0] for field in model.model_fields]
    setting = BY_NAME[name].name if ours and name in BY_NAME else name
    if setting in known:
        return f"unknown field; did you mean {setting}?"
    of_others = {field: how for model, how in _MEMBERS.values() if model in here for field in model.model_fields}
    if setting in of_others and chosen is not None:
        return f"is a field of {of_others[setting]}, and this is {chosen[1]}"
    for home, models in homes.items():
        if any(setting in model.model_fields for model in models):
            named = f", as {setting}" if setting != name else ""
            return f"unknown field; it belongs {f'in {home}' if home else 'at the top level'}{named}"
    if ours and (name in BY_NAME or name.partition(".")[0] in SECTIONS):
        return f"unknown field; it belongs in {EXTRAS}"
    if close := get_close_matches(name, known, 1):
        return f"unknown field; did you mean {close[0]}?"
    if close := get_close_matches(name, of_others, 1):
        return f"unknown field; did you mean {close[0]}, of {of_others[close[0]]}?"
    if ours and (close := get_close_matches(name, BY_NAME, 1)):
        return f"unknown field; did you mean {close[0]}, in {EXTRAS}?"
    return f"unknown field; known fields: {', '.join(known)}" if known else "unknown field"


def without_nulls(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: without_nulls(value) if isinstance(value, dict) and key not in _OPAQUE else value
        for key, value in document.items()
        if value is not None
    }


def _beyond(document: dict[str, Any], errors: Sequence[Mapping[str, Any]], settings: Settings) -> list[Problem]:
    """Further problems of a request with `errors`: those that show once the fields with errors are left out."""
    rest = copy.deepcopy(document)
    for detail in errors:
        _remove(rest, _path(detail))
    missing = [name for name in ("model", "data") if name not in rest]
    try:
        config = Config.model_validate(rest | dict.fromkeys(missing, "-"))
    except ValidationError:
        return []
    return [problem for problem in _examine(rest, config, settings).problems if problem.param not in missing]


def _examine(document: dict[str, Any], config: Config, settings: Settings) -> Examined:
    try:
        plan, problems = make_plan(config), list[Problem]()
    except ConfigProblems as found:
        plan, problems = None, list(found.problems)
    architecture, model_problems = _check_model(config.model, plan, settings)
    problems += model_problems
    problems += _check_data("data", config.data, settings)
    if config.validation_data is not None:
        problems += _check_data("validation_data", config.validation_data, settings)
    return Examined(document, plan, architecture, problems)


def _remove(document: dict[str, Any], path: tuple[Any, ...]) -> None:
    """Remove the field at `path`; if it lies within a list, the whole list."""
    for part in path[:-1]:
        inner = document.get(part)
        if not isinstance(inner, dict):
            document.pop(part, None)
            return
        document = inner
    if path:
        document.pop(path[-1], None)


def _check_data(param: str, uri: str, settings: Settings) -> list[Problem]:
    if uri.startswith(RESULTS_PREFIX) and is_job_id(uri.removeprefix(RESULTS_PREFIX)):
        message = f"is a file with purpose {RESULTS_PURPOSE!r}: training needs {PURPOSE!r}"
        return [Problem(param, message, "wrong_purpose")]
    try:
        if is_file_id(uri):
            file_store(settings.files_url).get(uri)  # unlike check_data_uri, refuses a file that has expired
        else:
            check_data_uri(uri, settings)
    except UserError as error:
        return [_refusal(error, param)]
    except _NOT_A_PATH as error:
        return [Problem(param, _no_path(error), "data_not_found")]
    return []


def _check_model(model: str, plan: Plan | None, settings: Settings) -> tuple[Architecture | None, list[Problem]]:
    try:
        if classify_model(model) != "local":
            return None, []
        architecture = inspect_model_dir(local_directory(model, settings.allowed_model_roots))
        if plan is not None:
            check_suitable(plan, architecture)
    except UserError as error:
        return None, [_refusal(error, error.error.param or "model")]
    except _NOT_A_PATH as error:
        return None, [Problem("model", _no_path(error), "model_not_found")]
    return architecture, []


def _refusal(error: UserError, param: str) -> Problem:
    """Without the full stop: others may follow in the same sentence."""
    return Problem(param, error.error.message.removesuffix("."), error.error.code)


def _no_path(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else error
    return f"can't be used as a path or URI: {reason}"

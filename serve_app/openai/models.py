"""/v1/models: tuned models and base models. `serve_app.openai.tuned` resolves the names of tuned models; any other name
is that of a base model, as jobs take it."""

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, Response

from events.job import FineTuningJob
from serve_app.backend import JobLog
from serve_app.openai import mapping
from serve_app.openai.chat_objects import OpenAIModel, OpenAIModelList
from serve_app.openai.files import all_jobs
from serve_app.openai.tuned import checkpoint_of, directory_of, unknown_model
from serve_app.openapi import documented
from serve_app.routes import TheBackend
from trainers.errors import UserError
from trainers.models import smollm2
from trainers.models.names import ALIASES, classify_model, hub_model, local_directory
from trainers.resubmit import step_of
from trainers.settings import Settings

router = APIRouter(prefix="/v1", default_response_class=Response)
ModelName = Annotated[str, InPath(min_length=1, max_length=1024, description="The model's name; '/' and ':' included.")]
_OWNER = "tunewright"


@router.get("/models", summary="List models", responses=documented(OpenAIModelList, "The models."))
async def list_models(backend: TheBackend) -> Response:
    """Models of jobs that have succeeded and checkpoints, newest job first; then directories of
    TUNEWRIGHT_MODEL_ROOTS, and aliases. Hugging Face ids and URIs can be used too, but aren't listed."""
    models = await asyncio.to_thread(_models, await all_jobs(backend.log), backend.settings)
    return JSONResponse(OpenAIModelList(data=models).model_dump(mode="json"))


@router.get(
    "/models/{model:path}",
    summary="Retrieve a model",
    responses=documented(OpenAIModel, "The model.", 400, 404, 409),
)
async def retrieve(backend: TheBackend, model: ModelName) -> Response:
    """A model of the list, or a checkpoint by its id. A Hugging Face id is found once it has been trained or asked."""
    found = await checkpoint_of(backend.log, model)
    if found is not None:
        shown = OpenAIModel(id=model, created=_created(found.job), owned_by=_OWNER)
    else:
        shown = await asyncio.to_thread(_base_model, model, backend.settings)
    return JSONResponse(shown.model_dump(mode="json"))


async def source_of(log: JobLog, settings: Settings, name: str) -> str:
    """The model of that name, as `trainers.models.resolve.resolve_model` takes it. Raises RequestRefused."""
    found = await checkpoint_of(log, name)
    return await asyncio.to_thread(_base_source, name, settings) if found is None else await directory_of(found)


def _models(jobs: list[FineTuningJob], settings: Settings) -> list[OpenAIModel]:
    return [*(model for job in jobs for model in _models_of(job)), *_base_models(settings)]


def _models_of(job: FineTuningJob) -> list[OpenAIModel]:
    steps = dict.fromkeys(step for uri in reversed(job.checkpoints) if (step := step_of(uri)) is not None)
    names = [mapping.model_name(job)] if job.status == "success" and job.checkpoints else []
    names += [mapping.model_name(job, step) for step in steps]
    return [OpenAIModel(id=name, created=_created(job), owned_by=_OWNER) for name in names]


def _created(job: FineTuningJob) -> int:
    return int((job.finished_at or job.created).timestamp())


def _base_models(settings: Settings) -> list[OpenAIModel]:
    places = [place for root in (settings.model_cache, *settings.model_roots) for place in (root, *_entries(root))]
    converted = set(_conversions(settings))
    directories = [
        _in_directory(place) for place in dict.fromkeys(places) if place not in converted and _is_model(place)
    ]
    return [*directories, *(_alias(name, settings) for name in ALIASES)]


def _conversions(settings: Settings) -> list[Path]:
    """The demo model as it was converted, which is listed by its alias."""
    return [entry for entry in _entries(settings.model_cache) if smollm2.is_conversion(entry.name)]


def _entries(root: Path) -> list[Path]:
    try:
        return sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []


def _is_model(directory: Path) -> bool:
    try:
        return (directory / "config.json").is_file()
    except OSError:  # a directory that the service may not enter
        return False


def _in_directory(directory: Path) -> OpenAIModel:
    created = _modified(directory / "config.json") or 0
    return OpenAIModel(id=str(directory), created=created, owned_by="this machine")


def _alias(name: str, settings: Settings) -> OpenAIModel:
    repo = hub_model(name).repo
    directories = [_hub_directory(repo, settings)]
    if name.lower() == smollm2.MODEL_NAME:
        directories += _conversions(settings)
    created = max(_modified(directory) or 0 for directory in directories)
    return OpenAIModel(id=name, created=created, owned_by=repo.partition("/")[0])


def _hub_directory(repo: str, settings: Settings) -> Path:
    """Where a repository of a hub is kept once it has been fetched."""
    return settings.model_cache / "hub" / repo.replace("/", "--")


def _modified(path: Path) -> int | None:
    """When it was last modified, in Unix seconds; None if it isn't there, or can't be looked at."""
    try:
        return int(path.stat().st_mtime)
    except OSError:  # also of a path that is too long
        return None


def _base_model(name: str, settings: Settings) -> OpenAIModel:
    kind = _kind(name)
    if kind == "local":
        return _in_directory(Path(_base_source(name, settings))).model_copy(update={"id": name})
    if kind == "alias":
        return _alias(name, settings).model_copy(update={"id": name})
    if kind == "hub" and (created := _modified(_hub_directory(hub_model(name).repo, settings))) is not None:
        return OpenAIModel(id=name, created=created, owned_by=name.partition("/")[0])
    raise unknown_model(f"{name[:300]!a} has not been fetched yet: that happens when it is first trained or asked")


def _base_source(name: str, settings: Settings) -> str:
    if _kind(name) != "local":
        return name
    try:
        directory = local_directory(name, settings.allowed_model_roots)
    except UserError as error:
        raise unknown_model(error.error.message, error.error.code) from None
    if not _is_model(directory):
        raise unknown_model(f"{directory} holds no model, or can't be read; GET /v1/models lists all models")
    return str(directory)


def _kind(name: str) -> str:
    try:
        return classify_model(name)
    except (UserError, ValueError):
        raise unknown_model(
            f"there is no model {name[:300]!a}: GET /v1/models lists tuned models, aliases and directories; Hugging "
            "Face ids ('org/name') and s3:// or gs:// URIs are models too"
        ) from None

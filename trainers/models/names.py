"""Names of models in requests: their kinds, the aliases, and the directories that local paths may lead to."""

import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from trainers.errors import UserError
from trainers.models.model_files import storage_of
from trainers.models.smollm2 import MODEL_NAME as SMOLLM2

ModelKind = Literal["local", "alias", "remote", "hub"]

REMOTE_SCHEMES = ("s3", "gs")
ALIASES = {
    SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-360m-instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "smollm2-1.7b-instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b-instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-0.6b-base": "Qwen/Qwen3-0.6B-Base",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-1.7b-base": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-4b-base": "Qwen/Qwen3-4B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-8b-base": "Qwen/Qwen3-8B-Base",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "gemma-7b": "google/gemma-7b",
    "gemma-7b-it": "google/gemma-7b-it",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b",
    "gemma-2-27b-it": "google/gemma-2-27b-it",
    "gemma-3-270m": "google/gemma-3-270m",
    "gemma-3-270m-it": "google/gemma-3-270m-it",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "gemma-3-1b-it": "google/gemma-3-1b-it",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "phi-4": "microsoft/phi-4",
}
_HUB_ID = re.compile(
    r"(?![^@]*(?:--|\.\.))"  # in a name, but not in a revision
    r"(?P<repo>\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?)(?<!\.git)"
    r"(?:@(?P<revision>[A-Za-z0-9][\w./-]{0,119}))?",
    re.ASCII,
)
"""A repository's name as huggingface_hub accepts it, and a revision that is a valid file name once its slashes are
replaced by `--`."""
_HUB_RULE = (
    "each of the two has 1 to 96 letters, digits, '-', '_' or '.', and neither begins nor ends with '-' or '.'; "
    "'--', '..' and '.git' at the end are not allowed; a revision has up to 120 characters"
)


class HubModel(NamedTuple):
    """A repository on a Hugging Face hub. `revision` is a branch, a tag or a commit."""

    repo: str
    revision: str = "main"


def classify_model(model: str) -> ModelKind:
    """The kind of name that `model` is. Uses neither disk nor network.

    A path is local if it starts with '/', '.' or '~' or is a file URI; `org/name` is always a hub id. Raises UserError
    `invalid_value` for a name of no kind, or a URI that can't be used.
    """
    if "://" in model:
        return _classify_uri(model)
    if model.lower() in ALIASES:
        return "alias"
    if model.startswith(("/", ".", "~")):
        return "local"
    if _HUB_ID.fullmatch(model):
        return "hub"
    if model.startswith(("ft:", "ftckpt_")):
        raise _refused(
            f"{model!r} names no model here: tuned models and checkpoints can be named only in requests to the API, "
            "exactly as GET /v1/models or the list of a job's checkpoints shows them."
        )
    if "/" in model:
        raise _refused(
            f"{model!r} is not a Hugging Face id, 'org/name' or 'org/name@revision': {_HUB_RULE}. A directory is given "
            "as a path that starts with '/' or './'."
        )
    close = get_close_matches(model.lower(), ALIASES)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise _refused(
        f"{model!r} is not a model name{meant}: give an alias (GET /v1/models lists all), a Hugging Face id 'org/name' "
        "or 'org/name@revision', a directory path that starts with '/' or './', or an s3:// or gs:// URI of a "
        "directory."
    )


def hub_model(model: str) -> HubModel:
    """The repository and revision that a hub id or an alias stands for."""
    match = _hub_id(model)
    if match is None:
        raise _refused(f"{model!r} is not a Hugging Face id: {_HUB_RULE}.")
    return HubModel(match["repo"], match["revision"] or "main")


def base_name(model: str) -> tuple[str, str | None]:
    """The name and revision that other libraries load `model` by. For a hub id or an alias: its repository, and its
    revision or None (the newest commit). For any other name: the name itself, and None."""
    match = _hub_id(model)
    return (model, None) if match is None else (match["repo"], match["revision"])


def _hub_id(model: str) -> re.Match[str] | None:
    return _HUB_ID.fullmatch(ALIASES.get(model.lower(), model))


def local_directory(model: str, roots: Iterable[Path]) -> Path:
    """The path of a local model, with links resolved. It must lie under one of `roots`, and so must the targets of the
    links in it, as files such as the tokenizer are copied to every checkpoint.

    Raises UserError `model_not_found`, or `path_not_allowed`, whose message tells neither whether something exists
    there nor where the roots are; InfrastructureError `model_unreachable`.
    """
    allowed = [root.resolve() for root in roots]
    try:
        path = Path(unquote(urlsplit(model).path) if "://" in model else model).expanduser().resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a loop of links, `~nobody`
        raise UserError("model_not_found", f"{model!r} is not a usable path: {error}.", param="model") from None
    if not any(path.is_relative_to(root) for root in allowed):
        raise UserError(
            "path_not_allowed",
            f"{model!r} is outside the directories that local models may be in",
            param="model",
            suggestion="move it into one of them (GET /v1/models lists what is there), or ask the operator to add its "
            "directory to TUNEWRIGHT_MODEL_ROOTS",
        )
    if not _is_directory(path):
        raise UserError("model_not_found", f"there is no model directory {path}.", param="model")
    for link in _links(path):
        target = Path(os.path.realpath(link))  # Path.resolve() raises for a loop of links
        if not any(target.is_relative_to(root) for root in allowed):
            raise UserError(
                "path_not_allowed",
                f"{link.relative_to(path)} of {model!r} is a link that leads outside the directories that models may "
                "be in",
                param="model",
                suggestion="put a copy there, or ask the operator to add the link's target to TUNEWRIGHT_MODEL_ROOTS",
            )
    return path


def _links(directory: Path, levels: int = 2) -> Iterator[Path]:
    """The symbolic links in a model's directory and in its folders, linked ones included. No file of a model lies
    deeper."""
    try:
        with storage_of(directory), os.scandir(directory) as entries:
            for entry in entries:  # the listing says which are links and folders, without a stat for each file
                is_folder = entry.is_dir(follow_symlinks=False)
                if entry.is_symlink():
                    yield Path(entry.path)
                    is_folder = _is_directory(Path(entry.path))
                if levels > 1 and is_folder:
                    yield from _links(Path(entry.path), levels - 1)
    except OSError as error:
        message = f"the model directory {directory} can't be read: {error.strerror or error}."
        raise UserError("model_not_found", message, param="model") from None


def _is_directory(path: Path) -> bool:
    try:
        with storage_of(path):
            return path.is_dir()
    except OSError:  # a name too long, a parent that can't be entered
        return False


def _classify_uri(model: str) -> ModelKind:
    try:
        uri = urlsplit(model)
    except ValueError as error:
        raise _refused(f"{model!r} is not a valid URI: {error}.") from None
    if uri.username or uri.password:
        raise _refused("the model's URI holds credentials: put them into the workers' environment instead.")
    if uri.query or uri.fragment:
        raise _refused(f"{model!r}: a model URI has no '?' or '#' part.")
    if "::" in model:
        raise _refused(f"{model!r}: '::' would chain file systems; a model is a directory of one store.")
    if uri.scheme == "file":
        if uri.netloc not in ("", "localhost"):
            raise _refused(f"{model!r} names a file on another host.")
        return "local"
    if uri.scheme in REMOTE_SCHEMES and uri.netloc:
        return "remote"
    schemes = ", ".join(f"{scheme}://" for scheme in ("file", *REMOTE_SCHEMES))
    raise _refused(f"{model!r} can't be used as a model URI; supported are {schemes} with a path.")


def _refused(message: str) -> UserError:
    return UserError("invalid_value", message, param="model")

"""Which files of a model that lies elsewhere are fetched."""

from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path

from trainers.models.architecture import read_architecture
from trainers.models.model_files import (
    INDEX_SUFFIX,
    SINGLE_FILE,
    WEIGHTS_KEY,
    incomplete,
    indexed_names,
    named_weights,
    read_json_object,
)

CHAT_TEMPLATES = "additional_chat_templates"
"""The one folder of a model directory whose files are wanted."""
_WANTED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    f"{CHAT_TEMPLATES}/*",
    "LICENSE*",
    "NOTICE*",
    "model*.safetensors",
    "model.safetensors.index.json",
)


def may_be_wanted(name: str) -> bool:
    """Whether a file of a model directory, named by its path in it, is one that training or the export may need. Which
    of several weights they need, its config.json says."""
    return _is_wanted(name) or _is_weights(name)


def choose_files(names: Collection[str], partial: Path, fetch: Callable[[str], None], origin: str) -> list[str]:
    """Those of the files `names` at `origin` that training or the export needs. What it takes to tell, config.json and
    maybe an index, `fetch` puts into `partial`. An architecture that can't be trained is refused.

    Raises UserError `model_incomplete` or `model_unsupported`, and what `fetch` raises.
    """
    if "config.json" not in names:
        raise incomplete(f"{origin} has no config.json.")
    fetch("config.json")
    config = read_json_object(partial / "config.json")
    read_architecture(config)
    named = named_weights(config, origin)
    if named is None:
        chosen = [name for name in names if _is_wanted(name)]
        if not any(name.endswith(".safetensors") for name in chosen):
            pickled = any(name.endswith(".bin") for name in names)
            why = " (only pickle files, which are never opened here)" if pickled else ""
            raise incomplete(f"{origin} has no weights named {SINGLE_FILE} or model-*.safetensors{why}.")
        return chosen
    if named not in names:
        raise incomplete(f"{origin} has no {named}, which {WEIGHTS_KEY} of config.json names.")
    weights = {named}
    if named.endswith(INDEX_SUFFIX):
        fetch(named)
        weights |= set(indexed_names(partial / named))
    return [name for name in names if name in weights or (_is_wanted(name) and not _is_weights(name))]


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in _WANTED)


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", INDEX_SUFFIX))

"""Which files of a model on a hub or an object store are fetched."""

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from trainers.models.architecture import read_architecture
from trainers.models.model_files import (
    INDEX_FILE,
    INDEX_SUFFIX,
    SINGLE_FILE,
    WEIGHTS_KEY,
    first_few,
    incomplete,
    indexed_names,
    named_weights,
    read_json_object,
)

CHAT_TEMPLATES = "additional_chat_templates"
"""The folder of a model directory that holds chat templates by name: the only one whose files are used."""
_COMPANIONS = (
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
)
"""Patterns of what belongs to a model besides its weights."""


def may_be_wanted(name: str) -> bool:
    """Whether training or the export may need the file of this name, which is its path in the model directory. Of
    several files of weights, `choose_files` says which."""
    return _is_companion(name) or ("/" not in name and name.endswith((".safetensors", INDEX_SUFFIX)))


def choose_files(names: Collection[str], partial: Path, fetch: Callable[[str], None], origin: str) -> list[str]:
    """Returns those of the files `names` at `origin` that training or the export needs. To find out, it has `fetch` put
    config.json, and the index of the weights if there is one, into `partial`.

    Raises UserError `model_incomplete`, `model_unsupported` for an architecture that can't be trained, and what `fetch`
    raises.
    """
    if "config.json" not in names:
        raise incomplete(f"{origin} has no config.json.")
    fetch("config.json")
    config = read_json_object(partial / "config.json")
    read_architecture(config)
    weights = _main_file(config, names, origin)
    wanted = {weights}
    if weights.endswith(INDEX_SUFFIX):
        fetch(weights)
        wanted |= set(indexed_names(partial / weights))
        if missing := sorted(wanted - set(names)):
            raise incomplete(f"{origin} lacks the weight files {first_few(missing)} that {weights} names.")
    return [name for name in names if name in wanted or _is_companion(name)]


def _main_file(config: Mapping[str, Any], names: Collection[str], origin: str) -> str:
    """The file that holds the weights, or their index; chosen as `model_files.weight_files` does."""
    named = named_weights(config, origin)
    if named is not None:
        if named not in names:
            raise incomplete(f"{origin} has no {named}, which {WEIGHTS_KEY} of config.json names.")
        return named
    for name in (SINGLE_FILE, INDEX_FILE):
        if name in names:
            return name
    pickled = any(name.endswith(".bin") for name in names)
    why = " (only pickle files, which are never opened here)" if pickled else ""
    raise incomplete(f"{origin} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there{why}.")


def _is_companion(name: str) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in _COMPANIONS)

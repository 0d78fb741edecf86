"""Writes the files of a model or adapter directory, readable by everyone (mode 0644) whatever the writer's umask."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from trainers.models.wanted_files import CHAT_TEMPLATES

FILE_MODE = 0o644
GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_OTHER_FILES = (GENERATION_CONFIG, "LICENSE*", "NOTICE*")


def copy_companions(source_dir: Path, out_dir: Path) -> None:
    """Copies a model's files besides weights and config.json: tokenizer, chat templates, generation config, licence."""
    copy_tokenizer(source_dir, out_dir)
    _copy(_OTHER_FILES, source_dir, out_dir)


def copy_tokenizer(source_dir: Path, out_dir: Path) -> None:
    """Copies the tokenizer and the chat templates of a model."""
    _copy(_TOKENIZER_FILES, source_dir, out_dir)
    _copy(("*.jinja",), source_dir / CHAT_TEMPLATES, out_dir / CHAT_TEMPLATES)


def _copy(patterns: Iterable[str], source_dir: Path, out_dir: Path) -> None:
    """Copies the files that match; makes `out_dir` if there are any."""
    for pattern in patterns:
        for file in source_dir.glob(pattern):
            if file.is_file():
                out_dir.mkdir(exist_ok=True)
                shutil.copyfile(file, out_dir / file.name)
                (out_dir / file.name).chmod(FILE_MODE)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors with mode 0644 and the metadata `format: pt`, which transformers requires."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(FILE_MODE)


def write_json(value: Any, path: Path) -> None:  # noqa: ANN401  -- any JSON value
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(FILE_MODE)

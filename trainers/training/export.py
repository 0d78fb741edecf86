"""Exports a trained model as a model directory in Hugging Face layout, which loads anywhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainers.data.chat import ChatTokenizer
from trainers.models.architecture import Architecture
from trainers.models.export_files import GENERATION_CONFIG, write_json, write_text
from trainers.models.model_files import read_json_object
from trainers.models.weights import save_hf_model


def export_model(weights: Mapping[str, Tensor], arch: Architecture, model_dir: Path, out_dir: Path) -> None:
    """Writes everything that inference needs to `out_dir`: `weights`, and the other files of `model_dir`. If that has
    no chat template, it writes the one that was used in training. The generation config lists every token that ends
    an answer."""
    save_hf_model(weights, arch, model_dir, out_dir)
    tokenizer = ChatTokenizer.from_dir(model_dir, whole=False)
    write_json(_generation_config(tokenizer, arch, model_dir), out_dir / GENERATION_CONFIG)
    if not tokenizer.has_own_template:
        write_text(tokenizer.template, out_dir / "chat_template.jinja")


def _generation_config(tokenizer: ChatTokenizer, arch: Architecture, model_dir: Path) -> dict[str, Any]:
    """The model's generation config, with all tokens that end an answer: a base model's often has only the end of a
    text there, but the model was trained here to end a turn."""
    file = model_dir / GENERATION_CONFIG
    if file.exists():
        config = read_json_object(file)
    else:  # without the file, transformers takes these from config.json
        config = {key: arch.json[key] for key in ("bos_token_id", "pad_token_id") if arch.json.get(key) is not None}
    ids = [id_ for id_ in tokenizer.eos_ids if id_ < arch.vocab_size]
    return config | {"eos_token_id": ids[0] if len(ids) == 1 else ids}

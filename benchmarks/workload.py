"""The models of the training benchmarks, and their data: the demo's rows, tokenised once for all contenders."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.tickets.generate import make_rows
from trainers.data.cache import DataCache
from trainers.data.chat import ChatTokenizer
from trainers.data.dataset import TokenisedDataset
from trainers.data.prepare import prepare
from trainers.models.resolve import resolve_model
from trainers.planning.plan import LoraSpec
from trainers.settings import settings

ROOT = Path(__file__).parent.parent
TICKETS = ROOT / "examples" / "tickets" / "train.jsonl"
SMOLLM2 = "smollm2-135m-instruct"
SEED = 42
MAX_SEQ_LEN = 512
"""Longer than any row of the demo's data, so that no row is cut."""

QWEN2_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
"""The shape of Qwen2.5-0.5B. Vocabulary and special tokens are those of the tokenizer it is given: SmolLM2's."""


def smollm2() -> Path:
    """The directory of the real model, which is converted once and kept in the service's cache."""
    return resolve_model(SMOLLM2, settings(), print)


def random_05b(folder: Path) -> Path:
    """Makes a Hugging Face directory of QWEN2_05B with random weights and SmolLM2's tokenizer in `folder`."""
    import torch

    from trainers.models.architecture import read_architecture
    from trainers.models.export_files import write_json, write_safetensors
    from trainers.models.layout import checkpoint_tensors

    source, out = smollm2(), folder / "random-0.5b"
    out.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, out / name)
    theirs = json.loads((source / "config.json").read_text())
    ids = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    config = QWEN2_05B | {key: theirs[key] for key in ids}
    generator = torch.Generator().manual_seed(0)

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)

    tensors = {t.name: value(t.name, t.shape) for t in checkpoint_tensors(read_architecture(config))}
    write_safetensors(tensors, out / "model.safetensors")
    write_json(config, out / "config.json")
    return out


def tickets(rows: int | None = None) -> list[str]:
    """The lines of the demo's training data; or `rows` generated ones of the same kind, all different and with all
    tokens trained. The model can't predict their names and numbers, so the loss doesn't go to zero."""
    if rows is None:
        return TICKETS.read_text(encoding="utf-8").splitlines()
    return [
        json.dumps({**row, "keep_loss": [True] * len(row["dialog"])}) for row in make_rows({"train": rows})["train"]
    ]


def prepared_rows(model_dir: Path, out_dir: Path, lines: Sequence[str]) -> Path:
    """The rows of `lines`, prepared for `trainers.training.recipe.train`."""
    source = out_dir.with_suffix(".jsonl")
    source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    prepare(
        source.as_uri(),
        ChatTokenizer.from_dir(model_dir),
        max_seq_len=MAX_SEQ_LEN,
        out_dir=out_dir,
        cache=DataCache(out_dir.with_suffix(".cache"), max_bytes=1 << 30),
        progress=print,
    )
    return out_dir


def rows_for_others(prepared: Path) -> Path:
    """The same rows as JSON lines of `input_ids` and unshifted `labels` (-100 where a token isn't trained)."""
    data = TokenisedDataset(prepared)
    file = prepared.with_suffix(".rows.jsonl")
    with file.open("w", encoding="utf-8") as out:
        for index in range(len(data)):
            tokens, trained = data[index]
            row = {"input_ids": tokens.tolist(), "labels": np.where(trained, tokens, -100).tolist()}
            out.write(json.dumps(row) + "\n")
    return file


def conversations(out: Path, lines: Sequence[str]) -> Path:
    """The same rows as `messages`, the format in TRL's documentation."""
    out.write_text("".join(json.dumps({"messages": json.loads(line)["dialog"]}) + "\n" for line in lines))
    return out


def first_adapter(model_dir: Path, lora: LoraSpec, file: Path) -> None:
    """Writes the initial `lora` adapter of our recipe with the default seed, with torchtune's names."""
    import torch

    from trainers.methods.lora import initial_adapter, lora_linear
    from trainers.models.architecture import inspect_model_dir
    from trainers.models.decoder import build_decoder
    from trainers.models.export_files import write_safetensors

    with torch.device("meta"):
        decoder = build_decoder(inspect_model_dir(model_dir), linear=lora_linear(lora))
    write_safetensors(initial_adapter(decoder, seed=SEED), file)

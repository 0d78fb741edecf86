"""For comparison: the time that torchtune's own `tune run lora_finetune_single_device` takes to its first step.

With the same model and rows, on the same machine, without Ray. torchtune reads the model's byte-level BPE as a Qwen2
tokenizer, the only one of its tokenizers for this format.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.stock import adapter_config, model_config


def seconds_to_first_step(model: Path, data: Path, scratch: Path) -> float:
    """The time from the start of the command until the recipe shows the loss of step 1. The run is killed then."""
    config = scratch / "stock.yaml"
    config.write_text(yaml.safe_dump(_config(model, data, scratch)))
    tune = Path(sys.executable).parent / "tune"
    started = time.monotonic()
    process = subprocess.Popen(
        [tune, "run", "lora_finetune_single_device", "--config", config],
        env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    seen = b""
    try:
        while chunk := os.read(process.stdout.fileno(), 4096):
            seen += chunk
            if b"|Loss:" in seen:  # its progress bar, once a step is done
                return time.monotonic() - started
    finally:
        process.kill()
        process.wait()
    raise RuntimeError(f"the stock recipe ended before its first step:\n{seen.decode(errors='replace')[-3000:]}")


def _config(model: Path, data: Path, scratch: Path) -> dict[str, Any]:
    shape = json.loads((model / "config.json").read_text())
    return {
        "output_dir": str(scratch / "stock"),
        "model": model_config(shape, adapter_config()),
        "tokenizer": {"_component_": "torchtune.models.qwen2.qwen2_tokenizer", **_tokenizer_files(model, scratch)},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(model),
            "checkpoint_files": ["model.safetensors"],
            "output_dir": str(scratch / "stock"),
            "model_type": "LLAMA3_2",
        },
        "dataset": {
            "_component_": "torchtune.datasets.chat_dataset",
            "source": "json",
            "data_files": str(data),
            "split": "train",
            "conversation_column": "dialog",
            "conversation_style": "openai",
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-4},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(scratch)},
        "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False},
        "device": "cpu",
        "dtype": "fp32",
        "seed": 42,
        "shuffle": True,
        "batch_size": 4,
        "epochs": 1,
        "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1,
        "compile": False,
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
    }


def _tokenizer_files(model: Path, scratch: Path) -> dict[str, str]:
    """Writes the vocab.json and merges.txt that are in tokenizer.json; the tokenizer's arguments."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab, merges = scratch / "vocab.json", scratch / "merges.txt"
    vocab.write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges.write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in tokenizer["model"]["merges"]))
    return {"path": str(vocab), "merges_file": str(merges), "special_tokens_path": str(model / "tokenizer.json")}

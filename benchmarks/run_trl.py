"""One run of TRL's SFTTrainer, as a process of its own: `.venv-trl/bin/python -m benchmarks.run_trl TASK.json`.

It runs in the environment of benchmarks/requirements-trl.txt, which has neither torchtune nor this project's packages.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.contender import Recording, Task

NAMES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
"""torchtune's names of the attention layers, and transformers'."""


class _Clock(TrainerCallback):  # type: ignore[misc]  # untyped here
    """With `logging_steps=1` the trainer logs at the end of every step."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._tokens = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **others: Any) -> None:  # noqa: ANN401 -- the trainer's
        if "loss" in logs:
            seen = int(logs["num_tokens"])  # all tokens so far, without padding
            self._recording.step(seen - self._tokens, float(logs["loss"]))
            self._tokens = seen


def main() -> None:
    recording = Recording(task := Task.from_argv())
    recording.mark("imported")
    arguments: dict[str, Any] = {
        "output_dir": task.output_dir,
        "max_steps": task.steps,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    lora = LoraConfig() if task.method == "lora" else None  # as in the documentation's example
    if task.equal:
        arguments |= _equal(task)
        if lora is not None:
            lora = LoraConfig(
                r=task.lora_rank,
                lora_alpha=task.lora_alpha,
                target_modules=[NAMES[module] for module in task.lora_attn_modules],
                lora_dropout=0.0,
            )
    trainer = SFTTrainer(
        model=task.model_dir,
        args=SFTConfig(**arguments),
        train_dataset=_rows(task),
        peft_config=lora,
    )
    if task.equal:
        # transformers doesn't train the embedding of the padding token, which is here also the end of every turn.
        trainer.model.get_input_embeddings().padding_idx = None
    if task.equal and lora is not None:
        _start_adapters_from(trainer.model, Path(task.adapter))
    recording.settings = _settings(trainer, lora)
    recording.mark("loaded")
    trainer.add_callback(_Clock(recording))
    trainer.train()


def _equal(task: Task) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": task.batch_size,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "bf16": task.dtype == "bf16",
        "model_init_kwargs": {"dtype": {"fp32": "float32", "bf16": "bfloat16"}[task.dtype]},
        "gradient_checkpointing": False,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": task.weight_decay,
        "max_grad_norm": 0.0,  # not clipped
        "max_length": 512,
        "seed": 42,
    }


def _rows(task: Task) -> Dataset:
    if not task.equal:
        return load_dataset("json", data_files=task.conversations, split="train")
    lines = Path(task.rows).read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def _start_adapters_from(model: torch.nn.Module, file: Path) -> None:
    """Starts the adapters from the values in `file` instead of peft's random ones."""
    values = load_file(file)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            continue
        # base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
        _, _, rest = name.partition(".layers.")
        index, _, module, matrix, *_ = rest.split(".")
        ours = next(torchtunes for torchtunes, theirs in NAMES.items() if theirs == module)
        value = values.pop(f"layers.{index}.attn.{ours}.{matrix.lower()}.weight")
        parameter.data.copy_(value)
    assert not values, f"adapters without a place in peft's model: {sorted(values)}"


def _settings(trainer: Any, lora: LoraConfig | None) -> dict[str, Any]:  # noqa: ANN401 -- untyped here
    args = trainer.args
    weights = {str(parameter.dtype) for parameter in trainer.model.parameters()}
    return {
        "batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "bf16 autocast": args.bf16,
        "weights": sorted(weights),
        "gradient_checkpointing": args.gradient_checkpointing,
        "optimizer": args.optim.value,
    } | ({"rank": lora.r, "on": sorted(lora.target_modules)} if lora else {})


if __name__ == "__main__":
    main()

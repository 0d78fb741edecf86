"""One run of torchtune's own recipe, as a process of its own: `python -m benchmarks.run_torchtune TASK.json`.

It runs the recipe's file as it is installed, with one of torchtune's configs and the changes in `_config`.
With WORLD_SIZE > 1 (and torchrun's other variables) it is one rank of a gloo group.
"""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtune.modules.peft import get_adapter_params

from benchmarks import stock_parts
from benchmarks.contender import Recording, Task
from benchmarks.stock import adapter_config, join_on_cpu, model_config, recipe_class, shipped_config
from trainers.training.distributed import like

CONFIGS = {"llama": "llama3_2/1B", "qwen2": "qwen2_5/0.5B"}
"""The shipped configs of the smallest model of each family."""
SUFFIXES = {("full", 1): "full_single_device", ("lora", 1): "lora_single_device", ("lora", 2): "lora"}


def main() -> None:
    recording = Recording(task := Task.from_argv())
    recording.mark("imported")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        join_on_cpu()
    config = _config(task, world)
    recipe = recipe_class(task.method, world)(cfg=config)
    if task.method == "lora" and task.equal:
        _start_adapters_from(recipe, Path(task.adapter))
    recording.settings = _settings(config)
    stock_parts.on_step = recording.step
    recipe.setup(cfg=config)
    recording.mark("loaded")
    recipe.train()


def _start_adapters_from(recipe: Any, file: Path) -> None:  # noqa: ANN401 -- a recipe
    """Makes the recipe start its adapters from the values in `file` instead of random ones."""
    set_up = recipe._setup_model

    def with_given_adapters(*args: Any, **kwargs: Any) -> nn.Module:  # noqa: ANN401 -- the recipe's arguments
        model: nn.Module = set_up(*args, **kwargs)
        values: dict[str, Tensor] = load_file(file)
        for name, parameter in get_adapter_params(model).items():
            parameter.data.copy_(like(values.pop(name).to(parameter.dtype), parameter))
        assert not values, f"adapters without a place in the stock model: {sorted(values)}"
        return model

    recipe._setup_model = with_given_adapters


def _config(task: Task, world: int) -> DictConfig:
    shape = json.loads((Path(task.model_dir) / "config.json").read_text())
    config = shipped_config(f"{CONFIGS[shape['model_type']]}_{SUFFIXES[task.method, world]}")
    adapters = {key: value for key, value in config.pop("model").items() if key.startswith(("lora_", "apply_lora"))}
    if task.equal and task.method == "lora":
        adapters = adapter_config(task.lora_attn_modules, rank=task.lora_rank, alpha=task.lora_alpha)
    changes: dict[str, Any] = {
        "output_dir": task.output_dir,
        "model": model_config(shape, adapters or None),
        "tokenizer": {"_component_": "benchmarks.stock_parts.Padding"},
        "checkpointer": {"checkpoint_dir": task.model_dir, "checkpoint_files": ["model.safetensors"]},
        "metric_logger": {"_component_": "benchmarks.stock_parts.Clock"},
        "device": "cpu",
        "max_steps_per_epoch": task.steps,
        "log_every_n_steps": 1,
    }
    if task.equal:
        changes |= {
            "seed": 42,
            "shuffle": False,
            "dtype": task.dtype,
            "batch_size": task.batch_size // world,
            "gradient_accumulation_steps": 1,
        }
        optimizer = {"lr": task.lr, "weight_decay": task.weight_decay}
        if task.method == "full":
            changes["optimizer_in_bwd"] = False
        else:
            changes["lr_scheduler"] = {"_component_": "benchmarks.stock_parts.constant"}
        if task.exact_loss:
            changes["loss"] = {"_component_": "benchmarks.stock_parts.ExactCrossEntropy"}
        config.optimizer = {"_component_": "torch.optim.AdamW", "fused": True} | optimizer
        config.pop("lr_scheduler", None)
    elif config.optimizer["_component_"].startswith("bitsandbytes"):  # GPUs only
        config.optimizer = {"_component_": "torch.optim.AdamW", "lr": config.optimizer.lr}
    config.dataset = {"_component_": "benchmarks.stock_parts.rows", "file": task.rows}
    config.pop("tokenizer")
    config.pop("metric_logger")
    config.merge_with(changes)
    return config


def _settings(config: DictConfig) -> dict[str, Any]:
    shown = ("batch_size", "gradient_accumulation_steps", "dtype", "enable_activation_checkpointing", "compile")
    settings = {name: config[name] for name in shown} | {"optimizer": config.optimizer["_component_"]}
    if config.get("optimizer_in_bwd"):
        settings["optimizer_in_bwd"] = True
    if "lora_rank" in config.model:
        mlp = ["mlp"] if config.model.apply_lora_to_mlp else []
        settings |= {"rank": config.model.lora_rank, "on": [*config.model.lora_attn_modules, *mlp]}
    return settings


if __name__ == "__main__":
    main()

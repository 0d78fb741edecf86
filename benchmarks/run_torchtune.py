"""One run of torchtune's own recipe, as a process of its own: `python -m benchmarks.run_torchtune TASK.json`.

The recipe's file is run as it is installed, with one of the configs it ships; `_config` has everything that is changed.
It was not made for CPUs: with two workers three of its calls are replaced, by nothing or by their CPU counterparts.
With WORLD_SIZE > 1 (and torchrun's other variables) it is one rank of a gloo group.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtune import training
from torchtune.modules.peft import get_adapter_params

from benchmarks import stock_parts
from benchmarks.contender import Recording, Task
from trainers.distributed import like

RECIPES = {
    ("full", 1): ("full_finetune_single_device", "FullFinetuneRecipeSingleDevice"),
    ("lora", 1): ("lora_finetune_single_device", "LoRAFinetuneRecipeSingleDevice"),
    ("lora", 2): ("lora_finetune_distributed", "LoRAFinetuneRecipeDistributed"),
}
CONFIGS = {"llama": "llama3_2/1B", "qwen2": "qwen2_5/0.5B"}
"""The shipped configs of the smallest model of each family."""
SUFFIXES = {("full", 1): "full_single_device", ("lora", 1): "lora_single_device", ("lora", 2): "lora"}


def main() -> None:
    recording = Recording(task := Task.from_argv())
    recording.mark("imported")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
        _patch_for_cpu()
    config = _config(task, world)
    file, name = RECIPES[task.method, world]
    recipe = getattr(load_recipe(file), name)(cfg=config)
    if task.method == "lora" and task.equal:
        _start_adapters_from(recipe, Path(task.adapter))
    recording.settings = _settings(config)
    stock_parts.recording = recording
    recipe.setup(cfg=config)
    recording.mark("loaded")
    recipe.train()


def recipe_folder() -> Path:
    """torchtune's recipes lie in a package that refuses to be imported."""
    spec = importlib.util.find_spec("recipes")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def load_recipe(name: str) -> Any:  # noqa: ANN401 -- a module
    spec = importlib.util.spec_from_file_location(name, recipe_folder() / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _patch_for_cpu() -> None:
    training.get_memory_stats = lambda device, reset_stats=True: {}
    training.log_memory_stats = lambda stats: None
    training.cleanup_before_training = lambda: None


def _start_adapters_from(recipe: Any, file: Path) -> None:  # noqa: ANN401 -- a recipe
    """The recipe's adapters begin at the values of `file` instead of its own draw."""
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
    family = shape["model_type"]
    shipped = recipe_folder() / "configs" / f"{CONFIGS[family]}_{SUFFIXES[task.method, world]}.yaml"
    config = OmegaConf.load(shipped)
    assert isinstance(config, DictConfig)
    changes: dict[str, Any] = {
        "output_dir": task.output_dir,
        "model": _model(shape, task.method),
        "tokenizer": {"_component_": "benchmarks.stock_parts.NoTokenizer"},
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
            changes["model"] |= {
                "lora_attn_modules": list(task.lora_attn_modules),
                "apply_lora_to_mlp": False,
                "lora_rank": task.lora_rank,
                "lora_alpha": task.lora_alpha,
            }
        config.optimizer = {"_component_": "torch.optim.AdamW", "fused": True} | optimizer
        config.pop("lr_scheduler", None)
    elif config.optimizer["_component_"].startswith("bitsandbytes"):  # GPUs only
        config.optimizer = {"_component_": "torch.optim.AdamW", "lr": config.optimizer.lr}
    config.dataset = {"_component_": "benchmarks.stock_parts.Rows", "file": task.rows}
    config.pop("tokenizer")
    config.pop("metric_logger")
    lora = {key: value for key, value in config.pop("model").items() if key.startswith(("lora_", "apply_lora"))}
    changes["model"] = lora | changes["model"]
    merged = OmegaConf.merge(config, changes)
    assert isinstance(merged, DictConfig)
    return merged


def _settings(config: DictConfig) -> dict[str, Any]:
    shown = ("batch_size", "gradient_accumulation_steps", "dtype", "enable_activation_checkpointing", "compile")
    settings = {name: config[name] for name in shown} | {"optimizer": config.optimizer["_component_"]}
    if config.get("optimizer_in_bwd"):
        settings["optimizer_in_bwd"] = True
    if "lora_rank" in config.model:
        mlp = ["mlp"] if config.model.apply_lora_to_mlp else []
        settings |= {"rank": config.model.lora_rank, "on": [*config.model.lora_attn_modules, *mlp]}
    return settings


def _model(shape: dict[str, Any], method: str) -> dict[str, Any]:
    """torchtune's builder of the family, with the sizes of `shape`, a config.json."""
    builder = {"llama": "torchtune.models.llama3_2", "qwen2": "torchtune.models.qwen2"}[shape["model_type"]]
    name = {"llama": "llama3_2", "qwen2": "qwen2"}[shape["model_type"]]
    sizes = {
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "max_seq_len": shape["max_position_embeddings"],
        "intermediate_dim": shape["intermediate_size"],
        "norm_eps": shape["rms_norm_eps"],
        "rope_base": int(shape["rope_theta"]),
        "tie_word_embeddings": shape["tie_word_embeddings"],
    }
    if shape["model_type"] == "llama":
        sizes["scale_factor"] = 1
    prefix = "lora_" if method == "lora" else ""
    return {"_component_": f"{builder}.{prefix}{name}", **sizes}


if __name__ == "__main__":
    main()

"""torchtune's stock recipes: their classes, configs of models for them, and changes that they need on a CPU.

torchtune is imported only in the functions that use it, as that takes seconds.
"""

import gc
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

RECIPES = {
    ("full", 1): ("full_finetune_single_device", "FullFinetuneRecipeSingleDevice"),
    ("lora", 1): ("lora_finetune_single_device", "LoRAFinetuneRecipeSingleDevice"),
    ("lora", 2): ("lora_finetune_distributed", "LoRAFinetuneRecipeDistributed"),
}
"""Files and classes, by method and number of workers."""


def recipe_class(method: str, workers: int) -> Any:  # noqa: ANN401 -- torchtune ships no types
    """The class of a recipe of RECIPES, from its installed file."""
    file, name = RECIPES[method, workers]
    spec = importlib.util.spec_from_file_location(file, _folder() / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def shipped_config(name: str) -> "DictConfig":
    """A config that torchtune ships, e.g. `llama3_2/1B_lora`."""
    from omegaconf import DictConfig, OmegaConf

    config = OmegaConf.load(_folder() / "configs" / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    return config


def _folder() -> Path:
    """The directory of torchtune's recipes, a package that can't be imported."""
    spec = importlib.util.find_spec("recipes")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def model_config(shape: Mapping[str, Any], adapters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of torchtune's own builder for a llama or Qwen2 model with the config.json `shape`. `adapters`: the
    builder's LoRA arguments.

    A llama model whose head is tied to the embedding gets the builder of Llama 3.2 (with a scale factor of 1 if its
    rotary embedding isn't scaled), otherwise that of Llama 3.1 or, if its rotary embedding isn't scaled, of Llama 3.
    """
    scaling, tied = shape.get("rope_scaling"), shape["tie_word_embeddings"]
    own: dict[str, Any] = {}
    if shape["model_type"] == "qwen2":
        builder, own = "qwen2", {"tie_word_embeddings": tied}
    elif tied or scaling:
        builder, own = "llama3_2" if tied else "llama3_1", {"scale_factor": int(scaling["factor"]) if scaling else 1}
    else:
        builder = "llama3"
    return {
        "_component_": f"torchtune.models.{builder}.{'' if adapters is None else 'lora_'}{builder}",
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "intermediate_dim": shape["intermediate_size"],
        "max_seq_len": shape["max_position_embeddings"],
        "norm_eps": shape["rms_norm_eps"],
        "rope_base": int(shape["rope_theta"]),
        **own,
        **(adapters or {}),
    }


def adapter_config(
    attn_modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "output_proj"),
    *,
    mlp: bool = False,
    output: bool = False,
    rank: int = 8,
    alpha: int = 16,
) -> dict[str, Any]:
    """LoRA arguments for `model_config`."""
    return {
        "lora_attn_modules": list(attn_modules),
        "apply_lora_to_mlp": mlp,
        "apply_lora_to_output": output,
        "lora_rank": rank,
        "lora_alpha": alpha,
    }


def join_on_cpu() -> None:
    """Joins the process group that torchrun's variables describe, and lets torchtune's distributed recipes run in this
    process without an accelerator."""
    import torch.distributed as dist
    from torchtune import training

    # The LoRA recipe asks for "cuda:nccl,cpu:gloo", which torch without CUDA doesn't have. All runs of this process
    # share one gloo group: a second one couldn't use the same address.
    dist.init_process_group("gloo")
    dist.init_process_group = _nothing
    dist.destroy_process_group = _nothing
    # The recipes report the accelerator's memory and empty its cache, also on a CPU. The assertion looks up a name
    # first: with `trainers.deferred`, that runs the package's `__init__`, which would overwrite the replacements.
    assert callable(training.get_memory_stats)
    training.get_memory_stats = _no_memory_stats
    training.log_memory_stats = _nothing
    training.cleanup_before_training = gc.collect


def _nothing(*_: object, **__: object) -> None:
    pass


def _no_memory_stats(*_: object, **__: object) -> dict[str, float]:
    return {}

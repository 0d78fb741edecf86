"""torchtune's stock recipes, for whoever runs them: which there are, a model as a config has it, and what they need on
a CPU.

torchtune is imported where it is used: that takes seconds.
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
    """Of RECIPES, from the file as it is installed."""
    file, name = RECIPES[method, workers]
    spec = importlib.util.spec_from_file_location(file, _folder() / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def shipped_config(name: str) -> "DictConfig":
    """A config that torchtune ships: `llama3_2/1B_lora`, say."""
    from omegaconf import DictConfig, OmegaConf

    config = OmegaConf.load(_folder() / "configs" / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    return config


def _folder() -> Path:
    """The recipes lie in a package that refuses to be imported."""
    spec = importlib.util.find_spec("recipes")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def model_config(shape: Mapping[str, Any], adapters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """torchtune's own builder for the llama or Qwen2 whose config.json is `shape`. `adapters`: of LoRA, as the builder
    takes them.

    A llama is one of Llama 3.2 where its head is tied to the embedding (a scale factor of 1 makes its rotary embedding
    the plain one), else of Llama 3.1 or, with a plain rotary embedding, of Llama 3.
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
    """LoRA's adapters, for `model_config`."""
    return {
        "lora_attn_modules": list(attn_modules),
        "apply_lora_to_mlp": mlp,
        "apply_lora_to_output": output,
        "lora_rank": rank,
        "lora_alpha": alpha,
    }


def join_on_cpu() -> None:
    """Lets the distributed recipes run in this process, one of torchrun's, without an accelerator."""
    import torch.distributed as dist
    from torchtune import training

    # The LoRA recipe asks for "cuda:nccl,cpu:gloo", which a build of torch without CUDA doesn't have. One gloo group
    # serves all runs of this process: a second one could not meet at the same address.
    dist.init_process_group("gloo")
    dist.init_process_group = _nothing
    dist.destroy_process_group = _nothing
    # Both recipes report the accelerator's memory, and empty its cache, whatever device they run on. A name is looked
    # up before: where `trainers.deferred` is at work the package runs its `__init__` only then, over what was replaced.
    assert callable(training.get_memory_stats)
    training.get_memory_stats = _no_memory_stats
    training.log_memory_stats = _nothing
    training.cleanup_before_training = gc.collect


def _nothing(*_: object, **__: object) -> None:
    pass


def _no_memory_stats(*_: object, **__: object) -> dict[str, float]:
    return {}

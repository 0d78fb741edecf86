"""The keys that `extras` and the `key=value` part of `overrides` may contain, in one table.

A key is one setting of the plan; its `aliases` are torchtune's names for it. `REFUSED` lists the keys of torchtune
configs that have no meaning here, with the reason, so that none is silently ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

from trainers.planning.components import COMPONENTS, SECTIONS, allowed
from trainers.planning.values import Check, boolean, choice, integer, nullable, number, subset

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")


@dataclass(frozen=True)
class Key:
    """`default` and `meaning` are the texts in docs/configuration.md. `only`: the only method that has this setting."""

    name: str
    check: Check
    default: str
    meaning: str
    aliases: tuple[str, ...] = ()
    only: Literal["lora"] | None = None


_STEPS = integer(1, 10**9)

KEYS: tuple[Key, ...] = (
    Key("n_epochs", integer(1, 10_000), "1", "Passes over the training data.", ("epochs",)),
    Key(
        "batch_size",
        integer(1, 65_536),
        "8 rows; 4 packs if `packed`; 4 pairs with DPO",
        "Rows, packs or pairs per micro-batch and worker.",
    ),
    Key(
        "lr",
        number(0, 10, above=True),
        "4e-5 full, 6e-4 LoRA; with DPO 1e-6 and 1e-5",
        "Peak learning rate.",
        ("optimizer.lr",),
    ),
    Key(
        "gradient_accumulation_steps",
        integer(1, 65_536),
        "1",
        "Micro-batches whose gradients are summed before each optimizer step.",
    ),
    Key("seed", integer(0, 2**32 - 1), "42", "Seeds adapters, data order and dropout."),
    Key("shuffle", boolean, "true", "Put the rows into a new order in each epoch.", ("dataset.shuffle",)),
    Key(
        "group_by_length",
        boolean,
        "false",
        "Build each step from rows of similar length, so that workers wait less for each other. Needs `shuffle`; not "
        "with `packed`.",
    ),
    Key(
        "lora_attn_modules",
        subset(*ATTENTION_MODULES),
        "all four",
        "Attention layers that get an adapter.",
        ("model.lora_attn_modules",),
        "lora",
    ),
    Key(
        "apply_lora_to_mlp",
        boolean,
        "false",
        "Put adapters on the feed-forward layers, too.",
        ("model.apply_lora_to_mlp",),
        "lora",
    ),
    Key(
        "apply_lora_to_output",
        boolean,
        "false",
        "Put an adapter on the output head, too.",
        ("model.apply_lora_to_output",),
        "lora",
    ),
    Key("lora_rank", integer(1, 1024), "8", "Rank of the adapters.", ("model.lora_rank",), "lora"),
    Key(
        "lora_alpha",
        integer(1, 2**31 - 1),
        "16",
        "The update is scaled by alpha / rank.",
        ("model.lora_alpha",),
        "lora",
    ),
    Key(
        "lora_dropout",
        number(0, 1, below=True),
        "0",
        "Dropout before the adapters.",
        ("model.lora_dropout",),
        "lora",
    ),
    Key(
        "use_dora",
        boolean,
        "false",
        "DoRA: train the magnitude of each row of an adapted layer separately from its direction.",
        ("model.use_dora",),
        "lora",
    ),
    Key(
        "quantize_base",
        boolean,
        "false",
        "QLoRA: keep the frozen layers in 4 bits (NF4).",
        ("model.quantize_base",),
        "lora",
    ),
    Key(
        "enable_activation_checkpointing",
        boolean,
        "true full, false LoRA",
        "Recompute activations in the backward pass: less memory, about a third more time. On CPUs, done only if a "
        "worker's share of its node's memory could be too small otherwise.",
    ),
    Key(
        "memory_efficient_fsdp_wrap",
        boolean,
        "true full, false LoRA",
        "Shard the embedding and the output head as units of their own. No effect with one worker or a tied head.",
    ),
    Key(
        "fsdp_cpu_offload",
        boolean,
        "true full, false LoRA",
        "Keep the sharded state in host memory. No effect with one worker or without a GPU.",
    ),
    Key(
        "dtype",
        nullable(choice("fp32", "bf16", "mixed")),
        "null",
        "fp32, bf16, or mixed: compute in bf16, but keep what is trained in fp32. null: mixed on CUDA and on CPUs with "
        "bf16 instructions (AVX512-BF16, AMX), else fp32.",
    ),
    Key("compile", boolean, "false", "Compile each layer and the loss with torch.compile."),
    Key(
        "packed",
        boolean,
        "false",
        "Put several rows into one sequence of `max_seq_len` tokens; they don't attend to each other. Needs "
        "`max_seq_len`.",
        ("dataset.packed",),
    ),
    Key(
        "max_seq_len",
        nullable(integer(2, 2**20)),
        "null",
        "Cut rows after this many tokens. null: 4096, or what the model can take if that is less.",
        ("tokenizer.max_seq_len",),
    ),
    Key(
        "clip_grad_norm", nullable(number(0, above=True)), "null", "Clip the gradient to this norm. null: no clipping."
    ),
    Key(
        "max_steps_per_epoch",
        nullable(_STEPS),
        "null",
        "End each epoch after this many steps. null: after its last row.",
    ),
    Key("log_every_n_steps", _STEPS, "1", "Write a line to the job's log every so many steps."),
    Key(
        "save_every_n_steps",
        nullable(_STEPS),
        "null",
        "Save a checkpoint every so many steps, in addition to the one after each epoch. null: only after each epoch.",
    ),
    Key(
        "keep_last_n_checkpoints",
        nullable(integer(1, 10**6)),
        "null",
        "Keep this many checkpoints, and the best one; delete older ones. null: keep all.",
        ("keep_last_n",),
    ),
    Key(
        "run_val_every_n_steps",
        nullable(_STEPS),
        "null",
        "Evaluate on `validation_data` every so many steps, in addition to after each epoch; if the loss is the lowest "
        "so far, save a checkpoint. null: only after each epoch.",
    ),
    Key(
        "early_stopping_patience",
        nullable(integer(1, 10_000)),
        "null",
        "Stop after so many evaluations in a row without a new lowest loss on `validation_data`; `best_checkpoint` in "
        "the status has the lowest. null: train every epoch.",
    ),
    Key(
        "max_invalid_fraction",
        number(0, 1, below=True),
        "0",
        "Skip invalid rows, if they are no more than this fraction of a data file's rows.",
    ),
)
BY_NAME: Mapping[str, Key] = MappingProxyType({name: key for key in KEYS for name in (key.name, *key.aliases)})

_REQUEST = "it is a field of the request: set it there"
_LAYOUT = "the service decides where a job's files are stored"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "model": _REQUEST,
        "data": _REQUEST,
        "validation_data": _REQUEST,
        "logger": _REQUEST,
        "metadata": _REQUEST,
        "overrides": _REQUEST,
        "dataset": "set data in the request",
        "dataset_val": "set validation_data in the request",
        "tokenizer": "the model's own tokenizer and chat template are used",
        "metric_logger": "set logger in the request",
        "device": "the cluster decides: a GPU if there is one",
        "output_dir": _LAYOUT,
        "checkpointer": _LAYOUT,
        "checkpoint_dir": _LAYOUT,
        "resume_from_checkpoint": "an interrupted job resumes by itself",
        "save_adapter_weights_only": "a LoRA checkpoint always holds both the merged model and the adapter",
        "ref_checkpointer": "the reference is the model that the job starts from",
        "custom_sharded_layers": "use memory_efficient_fsdp_wrap",
        "fsdp_reshard_after_forward": "parameters are always resharded after the forward pass",
        "fsdp_sharding_strategy": "parameters are always fully sharded",
        "optimizer_in_bwd": (
            "the service does it where it changes no result: on one worker, without accumulation and clipping"
        ),
        "enable_activation_offloading": "use enable_activation_checkpointing",
        "enable_async_checkpointing": "checkpoints are written while training goes on, wherever memory allows",
        "log_peak_memory_stats": "peak memory is always among the metrics",
        "log_level": "the job's log has only one level",
        "profiler": "profiling isn't offered",
        "fake_quant_after_n_steps": "the quantizer rounds from the first step on",
        "cudnn_deterministic_mode": "set seed: the data order and the adapters follow from it",
        "num_workers": "rows are tokenised before training starts, so there is no data loader",
        "collate_fn": "rows are laid out one after another, without padding",
        "seed_offset": "set seed",
    }
)


def unknown_key(name: str) -> str:
    """The message about an unknown key: it names a similar one, or where all are listed."""
    known = [*BY_NAME, *SECTIONS]
    near = get_close_matches(name, known, 1) or get_close_matches(name.rpartition(".")[2], known, 1)
    return f"unknown key; {f'did you mean {near[0]}?' if near else 'docs/configuration.md lists all keys'}"


def unknown_argument(name: str, component: str) -> str:
    """The message about an argument that `component` doesn't take: it names a similar one, or the components that take
    it."""
    section, known = COMPONENTS[component].section, COMPONENTS[component].arguments
    others = [other for other in allowed(section) if name in COMPONENTS[other].arguments]
    beside = [key.removeprefix(f"{section}.") for key in BY_NAME if key.startswith(f"{section}.")]
    near = get_close_matches(name, [*known, *beside, "_component_"], 1)
    hint = f"; did you mean {section}.{near[0]}?" if near else ""
    hint = f"; it is an argument of {', '.join(others)}" if others else hint
    return f"unknown argument of {component}, which takes {', '.join(known)}{hint}"

"""The keys of `extras` and of the `key=value` part of `overrides`: one table for both.

A key is one setting of the plan. Its `aliases` are torchtune's spellings of it. Keys of torchtune configs that have no
meaning here stand in `REFUSED` with the reason, so that none is silently ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

from trainers.components import COMPONENTS, SECTIONS, allowed
from trainers.values import Check, boolean, choice, integer, nullable, number, subset

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")


@dataclass(frozen=True)
class Key:
    """`default` and `meaning` are the words of docs/configuration.md. `only`: the method it has a meaning for."""

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
        "8 rows; 4 packs, if `packed`; 4 pairs, with DPO",
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
    Key("shuffle", boolean, "true", "A new order of the rows in each epoch.", ("dataset.shuffle",)),
    Key(
        "group_by_length",
        boolean,
        "false",
        "Make steps of rows of similar length: workers wait less for each other. Only with `shuffle` and without "
        "`packed`.",
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
        "Adapters on the feed-forward layers.",
        ("model.apply_lora_to_mlp",),
        "lora",
    ),
    Key(
        "apply_lora_to_output",
        boolean,
        "false",
        "An adapter on the output head.",
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
        "Dropout in front of the adapters.",
        ("model.lora_dropout",),
        "lora",
    ),
    Key(
        "use_dora",
        boolean,
        "false",
        "DoRA: train the length of each row of an adapted layer apart from its direction.",
        ("model.use_dora",),
        "lora",
    ),
    Key(
        "quantize_base",
        boolean,
        "false",
        "QLoRA: hold the frozen layers in 4 bits (NF4).",
        ("model.quantize_base",),
        "lora",
    ),
    Key(
        "enable_activation_checkpointing",
        boolean,
        "true full, false LoRA",
        "Recompute activations in the backward pass: less memory, about a third more time. On CPUs only where a "
        "worker's share of its node's memory could be too small for them.",
    ),
    Key(
        "memory_efficient_fsdp_wrap",
        boolean,
        "true full, false LoRA",
        "Shard embedding and output head as units of their own. No effect with one worker or a tied head.",
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
        "fp32, bf16, or mixed: bf16, but what is trained is kept in fp32. null: mixed on CUDA and on CPUs that compute "
        "in bf16 (AVX512-BF16, AMX); else fp32.",
    ),
    Key("compile", boolean, "false", "Compile each layer and the loss with torch.compile."),
    Key(
        "packed",
        boolean,
        "false",
        "Put several rows into one sequence of `max_seq_len` tokens; none sees another. Needs `max_seq_len`.",
        ("dataset.packed",),
    ),
    Key(
        "max_seq_len",
        nullable(integer(2, 2**20)),
        "null",
        "Rows are cut after this many tokens. null: 4096, or what the model can take if that is less.",
        ("tokenizer.max_seq_len",),
    ),
    Key("clip_grad_norm", nullable(number(0, above=True)), "null", "Largest norm of the gradient. null: not clipped."),
    Key(
        "max_steps_per_epoch",
        nullable(_STEPS),
        "null",
        "An epoch ends after this many steps. null: with its last row.",
    ),
    Key("log_every_n_steps", _STEPS, "1", "A line in the job's log every so many steps."),
    Key(
        "save_every_n_steps",
        nullable(_STEPS),
        "null",
        "A checkpoint every so many steps, besides the one after each epoch. null: only those.",
    ),
    Key(
        "keep_last_n_checkpoints",
        nullable(integer(1, 10**6)),
        "null",
        "Older checkpoints are deleted, all but the best one. null: every checkpoint is kept.",
        ("keep_last_n",),
    ),
    Key(
        "run_val_every_n_steps",
        nullable(_STEPS),
        "null",
        "An evaluation on `validation_data` every so many steps, besides the one after each epoch; the best so far is "
        "saved. null: only those.",
    ),
    Key(
        "early_stopping_patience",
        nullable(integer(1, 10_000)),
        "null",
        "Stop after so many evaluations without a lower loss on `validation_data`; `best_checkpoint` of the status has "
        "the lowest. null: train every epoch.",
    ),
    Key(
        "max_invalid_fraction",
        number(0, 1, below=True),
        "0",
        "Bad rows of a data file are skipped up to this fraction of its rows.",
    ),
)
BY_NAME: Mapping[str, Key] = MappingProxyType({name: key for key in KEYS for name in (key.name, *key.aliases)})

_REQUEST = "it is a field of the request: set it there"
_LAYOUT = "the service decides where a job's files lie"
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
        "device": "the cluster decides: a GPU where there is one",
        "output_dir": _LAYOUT,
        "checkpointer": _LAYOUT,
        "checkpoint_dir": _LAYOUT,
        "resume_from_checkpoint": "an interrupted job resumes by itself",
        "save_adapter_weights_only": "a LoRA checkpoint always holds both the merged model and the adapter",
        "ref_checkpointer": "the reference is the model that the job starts from",
        "custom_sharded_layers": "use memory_efficient_fsdp_wrap",
        "fsdp_reshard_after_forward": "parameters are always resharded after the forward pass",
        "fsdp_sharding_strategy": "parameters are always fully sharded",
        "optimizer_in_bwd": "it is done where it changes no number: on one worker, without accumulation and clipping",
        "enable_activation_offloading": "use enable_activation_checkpointing",
        "enable_async_checkpointing": "checkpoints are written beside training wherever memory allows",
        "log_peak_memory_stats": "peak memory is always among the metrics",
        "log_level": "the job's log has one level",
        "profiler": "profiling isn't offered",
        "fake_quant_after_n_steps": "the quantizer's rounding is there from the first step",
        "cudnn_deterministic_mode": "set seed: the data order and the adapters follow from it",
        "num_workers": "rows are tokenised before training starts: there is no data loader to widen",
        "collate_fn": "rows lie behind one another, without padding",
        "seed_offset": "set seed",
    }
)


def unknown_key(name: str) -> str:
    """What is wrong with a key that no table knows, naming one that is like it or where they are."""
    known = [*BY_NAME, *SECTIONS]
    near = get_close_matches(name, known, 1) or get_close_matches(name.rpartition(".")[2], known, 1)
    return f"unknown key; {f'did you mean {near[0]}?' if near else 'docs/configuration.md lists those there are'}"


def unknown_argument(name: str, component: str) -> str:
    """What is wrong with an argument that `component` doesn't take, naming one that is like it or whose it is."""
    section, known = COMPONENTS[component].section, COMPONENTS[component].arguments
    others = [other for other in allowed(section) if name in COMPONENTS[other].arguments]
    beside = [key.removeprefix(f"{section}.") for key in BY_NAME if key.startswith(f"{section}.")]
    near = get_close_matches(name, [*known, *beside, "_component_"], 1)
    hint = f"; did you mean {section}.{near[0]}?" if near else ""
    hint = f"; it is an argument of {', '.join(others)}" if others else hint
    return f"unknown argument of {component}, which takes {', '.join(known)}{hint}"

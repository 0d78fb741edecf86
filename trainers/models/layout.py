"""Maps the tensors of a Hugging Face checkpoint to the parameters of our decoder: names and shapes.

A checkpoint tensor is the concatenation, along the first dimension, of one or more of our parameters (more than one if
the family stores fused projections). Loading splits, saving concatenates; no value is changed or permuted, so loading
and saving again is bit-exact. `architecture.py` says what else to edit for a new family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # `architecture` imports this module
    from trainers.models.architecture import Architecture
    from trainers.planning.plan import LoraSpec


class Part(NamedTuple):
    """A parameter of our decoder and the number of rows that it takes in the checkpoint tensor."""

    name: str
    rows: int


@dataclass(frozen=True)
class CheckpointTensor:
    name: str
    """As in the safetensors file, e.g. `model.layers.0.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class Linear(NamedTuple):
    """A linear layer of the checkpoint: its name there, its number of inputs, the modules of our decoder that its rows
    are divided among, and whether it has a bias."""

    name: str
    columns: int
    parts: tuple[Part, ...]
    bias: bool

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


def checkpoint_tensors(arch: Architecture) -> Iterator[CheckpointTensor]:
    """All tensors in a checkpoint of this architecture, in the order of the model."""
    yield _whole("model.embed_tokens.weight", "tok_embeddings.weight", (arch.vocab_size, arch.hidden_size))
    for layer in range(arch.num_layers):
        yield from _layer_tensors(arch, layer)
    yield _whole("model.norm.weight", "norm.scale", (arch.hidden_size,))
    if not arch.tied:
        yield from _linear_tensors(_head(arch))


def numbers_of(arch: Architecture) -> int:
    """The number of elements of all tensors in a checkpoint of this architecture."""
    return sum(prod(tensor.shape) for tensor in checkpoint_tensors(arch))


def linears(arch: Architecture) -> Iterator[Linear]:
    """All linear layers of a checkpoint, which adapters can be put on. An untied head is the last one."""
    for layer in range(arch.num_layers):
        yield from _layer_linears(arch, layer)
    if not arch.tied:
        yield _head(arch)


def adapts(lora: LoraSpec, layer: str) -> bool:
    """Whether the linear layer of that name (`layers.0.attn.q_proj`, `mlp.w1`, `output`) has an adapter."""
    *_, block, module = ("", *layer.split("."))
    return {"attn": module in lora.attn_modules, "mlp": lora.mlp}.get(block, lora.output)


def _whole(name: str, ours: str, shape: tuple[int, ...]) -> CheckpointTensor:
    return CheckpointTensor(name, shape, (Part(ours, shape[0]),))


def _head(arch: Architecture) -> Linear:
    return Linear("lm_head", arch.hidden_size, (Part("output", arch.vocab_size),), bias=False)


def _layer_tensors(arch: Architecture, layer: int) -> Iterator[CheckpointTensor]:
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    for name, norm in _norms(arch).items():
        yield _whole(f"{theirs}.{name}.weight", f"{ours}.{norm}.scale", (arch.hidden_size,))
    if arch.qk_norm:
        for norm in ("q_norm", "k_norm"):
            yield _whole(f"{theirs}.self_attn.{norm}.weight", f"{ours}.attn.{norm}.scale", (arch.head_dim,))
    for linear in _layer_linears(arch, layer):
        yield from _linear_tensors(linear)


def _norms(arch: Architecture) -> dict[str, str]:
    """The norms of a layer, the checkpoint's names and ours. `post_attention_layernorm` follows the attention, as it
    says, only in families with `post_norms`; in the others it precedes the feed-forward."""
    if arch.post_norms:
        return {
            "input_layernorm": "sa_norm",
            "post_attention_layernorm": "sa_scale",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_scale",
        }
    return {"input_layernorm": "sa_norm", "post_attention_layernorm": "mlp_norm"}


def _linear_tensors(linear: Linear) -> Iterator[CheckpointTensor]:
    shapes = {"weight": (linear.rows, linear.columns)} | ({"bias": (linear.rows,)} if linear.bias else {})
    for kind, shape in shapes.items():
        parts = tuple(Part(f"{part.name}.{kind}", part.rows) for part in linear.parts)
        yield CheckpointTensor(f"{linear.name}.{kind}", shape, parts)


def _layer_linears(arch: Architecture, layer: int) -> Iterator[Linear]:
    theirs, attn, mlp = f"model.layers.{layer}", f"layers.{layer}.attn", f"layers.{layer}.mlp"
    width, ffn = arch.hidden_size, arch.intermediate_size
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    q, k, v = Part(f"{attn}.q_proj", queries), Part(f"{attn}.k_proj", keys), Part(f"{attn}.v_proj", keys)
    gate, up = Part(f"{mlp}.w1", ffn), Part(f"{mlp}.w3", ffn)
    if arch.fused_projections:
        yield Linear(f"{theirs}.self_attn.qkv_proj", width, (q, k, v), arch.qkv_bias)
        yield Linear(f"{theirs}.mlp.gate_up_proj", width, (gate, up), arch.mlp_bias)
    else:
        for name, part in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            yield Linear(f"{theirs}.self_attn.{name}", width, (part,), arch.qkv_bias)
        for name, part in (("gate_proj", gate), ("up_proj", up)):
            yield Linear(f"{theirs}.mlp.{name}", width, (part,), arch.mlp_bias)
    output = Part(f"{attn}.output_proj", width)
    yield Linear(f"{theirs}.self_attn.o_proj", queries, (output,), arch.attention_output_bias)
    yield Linear(f"{theirs}.mlp.down_proj", ffn, (Part(f"{mlp}.w2", width),), arch.mlp_bias)

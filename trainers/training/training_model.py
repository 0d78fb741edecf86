"""The model that the recipe trains: a decoder that computes its own loss, on one device or sharded over the ranks.

A batch goes through `TrainingModel.forward`: embedding, layers, final norm, output head and loss. After the attention
of the last layer, only trained positions are computed, as the outputs at other positions are not used. That is exact,
and saves the largest matrix product of a step for every token of a prompt.

`build_training_model` builds the decoder on the meta device, shards it if need be, and loads the weights into it.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.training.precision import set_default_dtype

from trainers.methods import Method
from trainers.models.architecture import Architecture
from trainers.models.attention import Attend, allow_variants
from trainers.models.decoder import Embedding, build_decoder, causal, init_rope
from trainers.planning.memory import FITS
from trainers.planning.plan import Plan
from trainers.planning.precision import Device, Dtype, default_dtype
from trainers.training.collate import Batch
from trainers.training.distributed import Ranks, like, local
from trainers.training.loss import HeadLoss, look_up
from trainers.training.objectives import Measured, objective_of

COMPUTED_IN: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.bfloat16}
"""The dtype of weights and activations. In mixed, the optimizer updates fp32 copies of the trained weights."""


class TrainingModel(nn.Module):
    """Maps a batch to its summed loss under the plan's objective. The parameters are those of `decoder`."""

    sharded = False
    """Whether FSDP splits the parameters over the ranks; otherwise each rank holds all of them."""
    copies: Mapping[str, nn.Parameter] = MappingProxyType({})
    """If the dtype is mixed: fp32 copies of the trained parameters (master weights), by the decoder's names."""

    def __init__(self, decoder: TransformerDecoder, arch: Architecture, plan: Plan, computed_in: torch.dtype) -> None:
        super().__init__()
        self.decoder = decoder
        self.computed_in = computed_in
        self.objective = objective_of(plan)
        self.head = HeadLoss(
            decoder.output,
            arch.vocab_size,
            softcap=arch.final_softcap,
            label_smoothing=self.objective.label_smoothing,
            chunks=plan.loss.kwargs.get("num_output_chunks"),
            reuse_gradient=plan.updates_in_backward,
            compiled=partial(torch.compile, backend=_compile_backend()) if plan.compile else None,
        )
        self.recompute = plan.enable_activation_checkpointing

    def forward(self, batch: Batch) -> Measured:
        """The loss summed over the batch's trained tokens or pairs; 0, with zero gradients, if it has none.

        s: positions of the line; d: width of the model; n: trained positions; m: n rounded up (`Batch.wanted`).
        """
        hidden, head = self._embedded(batch.tokens)  # [1, s, d]
        seen, positions = causal(self.decoder, batch.tokens, batch.layout), batch.layout.positions
        for layer in self.decoder.layers:
            wanted = batch.wanted if layer is self.decoder.layers[-1] else None
            if self.recompute and self.training:
                hidden = checkpoint(_through, layer, hidden, seen, positions, wanted, use_reentrant=False)
            else:
                hidden = _through(layer, hidden, seen, positions, wanted)
        # hidden is [1, m, d] after the last layer
        hidden = self.decoder.norm(hidden[0, : len(batch.trained)])  # [n, d]
        return self.objective(head, hidden, batch)

    def _embedded(self, tokens: Tensor) -> tuple[Tensor, HeadLoss]:
        """The embeddings [1, s, d] of `tokens` [1, s], and the head to use with them.

        Where embedding and head are one trained matrix that isn't sharded, both get its gradient through `look_up`.
        """
        embedding = cast(Embedding, self.decoder.tok_embeddings)
        tied = isinstance(self.decoder.output, TiedLinear)
        if self.sharded or not tied or not embedding.weight.requires_grad:
            return embedding(tokens), self.head
        rows, matrix = look_up(embedding.weight, tokens)
        return embedding.scaled(rows), self.head.reading(matrix)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that get gradients, by the decoder's names, in the order of the model."""
        return {name: p for name, p in self.decoder.named_parameters() if p.requires_grad}

    def updated(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer updates and a checkpoint saves: `copies` if the dtype is mixed, otherwise
        `trainable`."""
        return dict(self.copies) or self.trainable()

    def gradients(self) -> list[Tensor]:
        """Every gradient, or this rank's shard of it."""
        return [local(p.grad) for p in self.trainable().values() if p.grad is not None]

    def reduce_gradients_in_backward(self, reduce: bool) -> None:
        """For sharded parameters: whether the next backward pass reduces the gradients over the ranks. Only the last
        micro-batch of a step needs it."""
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(reduce)


def _through(layer: nn.Module, hidden: Tensor, seen: Attend, positions: Tensor, wanted: Tensor | None) -> Tensor:
    """One layer, as `checkpoint` can call it: [1, s, d] -> [1, s, d], or [1, m, d] of the positions `wanted` [m]."""
    allow_variants()
    output: Tensor = layer(hidden, mask=seen, input_pos=positions, wanted=wanted)
    return output


def build_training_model(
    plan: Plan,
    method: Method,
    arch: Architecture,
    model_dir: Path,
    resume_from: Path | None,
    dtype: Dtype,
    ranks: Ranks,
) -> TrainingModel:
    """The model on this rank, with the weights of `model_dir` and of the checkpoint `resume_from`. Memory never holds
    more of them than a memory-mapped copy of the files and this rank's share."""
    computed_in = COMPUTED_IN[dtype]
    with set_default_dtype(computed_in), torch.device("meta"):
        decoder = build_decoder(arch, linear=method.linear)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(method.trains(name))
    if plan.compile:
        for layer in decoder.layers:
            layer.compile(backend=_compile_backend())
    model = TrainingModel(decoder, arch, plan, computed_in)
    if ranks.world > 1 and not _each_holds_all(decoder, plan, method, computed_in, ranks):
        model.sharded = True
        _shard(model, plan, arch, ranks)
    weights = method.weights(decoder, arch, model_dir, resume_from, computed_in)
    home = torch.device("cpu") if offloads(plan, ranks) else ranks.device
    make_copy = None if dtype != "mixed" else _in_fp32 if resume_from else _in_fp32_unrounded
    model.copies = _load(decoder, weights, method, computed_in, home, ranks.device, model.sharded, make_copy)
    init_rope(decoder, ranks.device)
    return model


def _each_holds_all(decoder: nn.Module, plan: Plan, method: Method, dtype: torch.dtype, ranks: Ranks) -> bool:
    """Whether each rank holds the whole model, so that only gradients are exchanged. All ranks get the same answer.

    True for a method whose model can't be sharded. Also for adapters on a frozen model that takes at most `FITS` of
    each worker's memory, unless the plan has an option that only a sharded model has.
    """
    if not method.shards:
        return True
    if not method.keeps_base or plan.fsdp_cpu_offload or plan.memory_efficient_fsdp_wrap:
        return False
    fits = parameter_count(decoder.parameters()) * dtype.itemsize <= FITS * ranks.memory_bytes()
    return ranks.sum([fits])[0] == ranks.world


def choose_dtype(plan: Plan, ranks: Ranks, before: Dtype | None = None) -> Dtype:
    """The plan's dtype; else `before`, the dtype of the checkpoint to resume from, which another kind of machine may
    have written; else the default of the ranks' devices, or fp32 where these differ. All ranks get the same answer."""
    if chosen := plan.dtype or before:
        return chosen
    device: Device = "cuda" if ranks.device.type == "cuda" else "cpu"
    suitable = default_dtype(device)
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        suitable = "fp32"
    agreed = ranks.sum([suitable != "fp32"])[0] == ranks.world
    return suitable if agreed else "fp32"


def offloads(plan: Plan, ranks: Ranks) -> bool:
    """Whether fsdp_cpu_offload has an effect here."""
    return plan.fsdp_cpu_offload and ranks.world > 1 and ranks.device.type == "cuda"


def _compile_backend() -> str:
    """The same choice as torchtune's."""
    return os.environ.get("TORCH_COMPILE_BACKEND", "inductor")


def _shard(model: TrainingModel, plan: Plan, arch: Architecture, ranks: Ranks) -> None:
    """Applies FSDP2 as torchtune does: one unit for each layer and one for the rest. With memory_efficient_fsdp_wrap,
    embedding and head are units of their own, unless they are one matrix."""
    # Not from torchtune.training, which imports all of torchtune.
    from torchtune.training._distributed import get_shard_conditions, shard_model

    separate = ["decoder.tok_embeddings", "decoder.output"] if plan.memory_efficient_fsdp_wrap and not arch.tied else []

    def is_unit(name: str, module: nn.Module) -> bool:
        return bool(get_shard_conditions(name, module, names_to_match=separate))

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    shard_model(cast(TransformerDecoder, model), [is_unit], cpu_offload=offloads(plan, ranks), dp_mesh=mesh)


def _load(
    decoder: TransformerDecoder,
    weights: dict[str, Tensor],
    method: Method,
    dtype: torch.dtype,
    home: torch.device,
    device: torch.device,
    sharded: bool,
    make_copy: Callable[[Tensor], Tensor] | None,
) -> dict[str, nn.Parameter]:
    """Loads `weights` into the decoder, in `dtype`, on `home`. Returns the fp32 copies of the trained parameters, made
    by `make_copy` on `device`; none if `make_copy` is None."""
    placed, copies = {}, {}
    for name, parameter in decoder.named_parameters():
        stored = weights.pop(name)
        full = stored.to(dtype)
        # A trained tensor gets its own memory, aligned the same whatever file it came from: resuming is exact.
        own = full.clone() if parameter.requires_grad and not sharded else full
        value = like(own, parameter, home)
        value = value if sharded else method.placed(name, value)
        if make_copy is not None and parameter.requires_grad:
            copies[name] = nn.Parameter(like(make_copy(stored.to(device)), parameter, home))
        placed[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    if weights:
        message = f"weights without a place in the model: {', '.join(sorted(weights))}"
        raise RuntimeError(message)
    decoder.load_state_dict(placed, strict=True, assign=True)
    return copies


def _in_fp32(stored: Tensor) -> Tensor:
    """The fp32 copy of a weight of a checkpoint."""
    return stored.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _in_fp32_unrounded(stored: Tensor) -> Tensor:
    """The fp32 copy of an initial weight. If all its values are bf16 numbers, whatever dtype the file has (a bf16 model
    loaded in fp32 and saved again), each value gets an offset within the interval that rounds to it; the offsets are
    spread evenly over the interval. Zeros stay.

    Without the offsets every copy would start in the middle of its interval and would have to move by half a bf16 step
    before its weight changed at all. With them, from the first update on, the share of weights that change corresponds
    to the size of the update, as it would with the weights before they were once rounded to bf16.
    """
    values = _in_fp32(stored)
    offsets = _rounding_offsets(stored.device)
    parts = torch.split(values.view(-1), offsets.numel())
    if not any((part.view(torch.int32) & 0xFFFF).any() for part in parts):  # bf16 is the upper half of fp32
        for part in parts:
            part.view(torch.int32).add_(offsets[: part.numel()] * (part != 0))
    return values


@cache
def _rounding_offsets(device: torch.device) -> Tensor:
    """Offsets [2**20], int32, to add to the bits of fp32 numbers that are bf16 numbers: the sums round to the same bf16
    number. They are the multiples of the golden ratio modulo 1, the sequence that fills an interval most evenly."""
    multiples = torch.arange(1 << 20, dtype=torch.int32).mul_(-1640531535)  # 2**32 / 1.618..., wrapping around
    return (multiples >> 16).clamp_(min=1 - (1 << 15)).to(device)


def parameter_count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)

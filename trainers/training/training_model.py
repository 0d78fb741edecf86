"""The model as the recipe trains it: a decoder that computes its own loss, placed on one device or sharded over ranks.

The output head, the final norm, and the last layer behind its attention see trained positions only: nobody sees what
they make of the others. That is exact, and it saves the largest matrix product of a step for every token of a prompt.
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


class TrainingModel(nn.Module):
    """Batch in, summed loss out, as the plan's objective has it. The parameters are the decoder's, under `decoder.`."""

    sharded = False
    """Whether FSDP splits the parameters over the ranks; otherwise each rank holds all of them."""
    copies: Mapping[str, nn.Parameter] = MappingProxyType({})
    """In fp32, of the parameters that are trained, where the dtype is mixed."""

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
            gone_by_next=plan.updates_in_backward,
            compiled=partial(torch.compile, backend=_compile_backend()) if plan.compile else None,
        )
        self.recompute = plan.enable_activation_checkpointing

    def forward(self, batch: Batch) -> Measured:
        """The loss summed over what the batch counts (`Batch.n_trained`). 0, with zero gradients, for nothing."""
        hidden, head = self._embedded(batch.tokens)  # [1, s, d]
        seen, positions = causal(self.decoder, batch.tokens, batch.layout), batch.layout.positions
        for layer in self.decoder.layers:
            wanted = batch.wanted if layer is self.decoder.layers[-1] else None
            if self.recompute and self.training:
                hidden = checkpoint(_through, layer, hidden, seen, positions, wanted, use_reentrant=False)
            else:
                hidden = _through(layer, hidden, seen, positions, wanted)
        hidden = self.decoder.norm(hidden[0, : len(batch.trained)])  # [n, d]
        return self.objective(head, hidden, batch)

    def _embedded(self, tokens: Tensor) -> tuple[Tensor, HeadLoss]:
        """Embeddings of `tokens` [1, s], and the head that goes with them."""
        embedding = cast(Embedding, self.decoder.tok_embeddings)
        tied = isinstance(self.decoder.output, TiedLinear)
        if self.sharded or not tied or not embedding.weight.requires_grad:
            return embedding(tokens), self.head
        rows, matrix = look_up(embedding.weight, tokens)
        return embedding.scaled(rows), self.head.reading(matrix)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What has gradients, by the decoder's names, in the order of the model."""
        return {name: p for name, p in self.decoder.named_parameters() if p.requires_grad}

    def updated(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates and checkpoints hold: `trainable`, or the copies of it."""
        return dict(self.copies) or self.trainable()

    def gradients(self) -> list[Tensor]:
        """What this rank holds of each gradient."""
        return [local(p.grad) for p in self.trainable().values() if p.grad is not None]

    def reduce_gradients_in_backward(self, reduce: bool) -> None:
        """For sharded parameters: whether the next backward pass adds the gradients up over the ranks. Micro-batches
        before a step's last one need not."""
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(reduce)


def _through(layer: nn.Module, hidden: Tensor, seen: Attend, positions: Tensor, wanted: Tensor | None) -> Tensor:
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
    """The model on this rank, its weights read from `model_dir` and the checkpoint to go on from. Never more than a
    memory-mapped copy of the weights and this rank's share is held."""
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
    copy = None if dtype != "mixed" else _in_fp32 if resume_from else _unrounded
    copies = _load(decoder, weights, method, computed_in, home, ranks.device, model.sharded, copy)
    model.copies = copies
    init_rope(decoder, ranks.device)
    return model


def _each_holds_all(decoder: nn.Module, plan: Plan, method: Method, dtype: torch.dtype, ranks: Ranks) -> bool:
    """Whether each rank keeps the whole model and only gradients of adapters travel: where the rest is frozen and
    fits, unless the plan asks for what only a sharded model has; or where it can't be split. All ranks agree."""
    if not method.shards:
        return True
    if not method.keeps_base or plan.fsdp_cpu_offload or plan.memory_efficient_fsdp_wrap:
        return False
    fits = parameter_count(decoder.parameters()) * dtype.itemsize <= FITS * ranks.memory_bytes()
    return ranks.sum([fits])[0] == ranks.world


def choose_dtype(plan: Plan, ranks: Ranks, before: Dtype | None = None) -> Dtype:
    """The plan's dtype; else `before`, that of the checkpoint to go on from, which another kind of machine may have
    written; else what suits every rank's device, and fp32 where they differ. All ranks agree."""
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
    """As torchtune chooses it."""
    return os.environ.get("TORCH_COMPILE_BACKEND", "inductor")


def _shard(model: TrainingModel, plan: Plan, arch: Architecture, ranks: Ranks) -> None:
    """FSDP2 as torchtune does it: a unit for each layer and one for the rest. With memory_efficient_fsdp_wrap embedding
    and head are units of their own; they can't be where they are one matrix."""
    # From the module itself: torchtune.training would bring the whole of torchtune along.
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
    copy: Callable[[Tensor], Tensor] | None,
) -> dict[str, nn.Parameter]:
    """Returns the copies in fp32 of what is trained, if any are to be kept: `copy` makes them, on `device`."""
    placed, copies = {}, {}
    for name, parameter in decoder.named_parameters():
        stored = weights.pop(name)
        full = stored.to(dtype)
        # A trained tensor gets memory of its own, aligned the same whatever file it came from: resuming is exact.
        own = full.clone() if parameter.requires_grad and not sharded else full
        value = like(own, parameter, home)
        value = value if sharded else method.placed(name, value)
        if copy is not None and parameter.requires_grad:
            copies[name] = nn.Parameter(like(copy(stored.to(device)), parameter, home))
        placed[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    if weights:
        message = f"weights without a place in the model: {', '.join(sorted(weights))}"
        raise RuntimeError(message)
    decoder.load_state_dict(placed, strict=True, assign=True)
    return copies


def _in_fp32(stored: Tensor) -> Tensor:
    return stored.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _unrounded(stored: Tensor) -> Tensor:
    """A copy in fp32; of numbers of bf16, whatever type they are stored in, one of such as are rounded to them, spread
    evenly over all that are. (A model that is loaded in fp32 and saved again holds the numbers it held before.)

    Copies that began in the middle of what is rounded alike would first have to go half a digit, each of them, before
    the model changed at all. So the share of the model's weights that changes fits the size of the update from the
    first one on. The numbers from which the stored ones had once been rounded would do the same. Zeros stay.
    """
    values = _in_fp32(stored)
    offsets = _offsets_within_a_digit(stored.device)
    parts = torch.split(values.view(-1), offsets.numel())
    if not any((part.view(torch.int32) & 0xFFFF).any() for part in parts):  # a bf16 is the upper half of a number
        for part in parts:
            part.view(torch.int32).add_(offsets[: part.numel()] * (part != 0))
    return values


@cache
def _offsets_within_a_digit(device: torch.device) -> Tensor:
    """int32, to be added to the bits of numbers in fp32 that bf16 has too: they don't leave what is rounded to the same
    one. Multiples of the golden ratio, modulo 1: of all sequences these fill an interval most evenly."""
    multiples = torch.arange(1 << 20, dtype=torch.int32).mul_(-1640531535)  # 2**32 / 1.618..., wrapping around
    return (multiples >> 16).clamp_(min=1 - (1 << 15)).to(device)


def parameter_count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)

"""The model as the recipe trains it: a decoder that computes its own loss, placed on one device or sharded over ranks.

The output head is applied to trained positions only, in chunks. That is exact, and it saves the largest matrix of a
step for every prompt and padding token.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TransformerDecoder
from torchtune.training import get_shard_conditions, set_default_dtype, shard_model

from trainers.batches import IGNORED, Batch
from trainers.distributed import Ranks, like
from trainers.models.architecture import Architecture
from trainers.models.decoder import adapter_parameters, build_decoder, causal, init_rope, initial_adapter
from trainers.models.weights import load_weights
from trainers.plan import Plan

DEFAULT_CHUNKS = 8


class TrainingModel(nn.Module):
    """Batch in, summed loss out. The parameters are the decoder's, under `decoder.`."""

    def __init__(self, decoder: TransformerDecoder, plan: Plan) -> None:
        super().__init__()
        self.decoder = decoder
        self.recompute = plan.enable_activation_checkpointing
        self.chunks = plan.loss.kwargs.get("num_output_chunks", DEFAULT_CHUNKS)
        self.label_smoothing = plan.loss.kwargs.get("label_smoothing", 0.0)
        self._cross_entropy = self._chunk_loss
        if plan.compile:
            self._cross_entropy = torch.compile(self._chunk_loss, backend=_compile_backend())

    def forward(self, batch: Batch) -> Tensor:
        """The loss summed over the batch's trained positions, float32, shape []. 0, with zero gradients, for none."""
        hidden = self.decoder.tok_embeddings(batch.tokens)  # [b, s, d]
        seen = causal(self.decoder, batch.tokens, batch.documents)
        for layer in self.decoder.layers:
            if self.recompute and self.training:
                hidden = checkpoint(layer, hidden, mask=seen, input_pos=batch.positions, use_reentrant=False)
            else:
                hidden = layer(hidden, mask=seen, input_pos=batch.positions)
        trained = batch.labels != IGNORED  # [b, s]
        hidden = self.decoder.norm(hidden)[trained]  # [n, d]
        labels = batch.labels[trained]  # [n]
        # tensor_split gives every rank the same number of chunks: a sharded head is gathered as often on each.
        chunks = zip(hidden.tensor_split(self.chunks), labels.tensor_split(self.chunks), strict=True)
        return torch.stack([self._cross_entropy(self.decoder.output(h), target) for h, target in chunks]).sum()

    def _chunk_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [n, v] are raised to float32 one chunk at a time."""
        return functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=self.label_smoothing)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by the decoder's names, in the order of the model."""
        return {name: p for name, p in self.decoder.named_parameters() if p.requires_grad}


def build_training_model(
    plan: Plan, arch: Architecture, model_dir: Path, adapter: dict[str, Tensor] | None, dtype: torch.dtype, ranks: Ranks
) -> TrainingModel:
    """The model on this rank, its weights read from `model_dir`; for LoRA with `adapter`, or with a new one from the
    seed. Never more than a memory-mapped copy of the weights and this rank's share is held."""
    with set_default_dtype(dtype), torch.device("meta"):
        decoder = build_decoder(arch, lora=plan.lora)
    trained = set(adapter_parameters(decoder)) if plan.lora else {name for name, _ in decoder.named_parameters()}
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name in trained)
    if plan.compile:
        for layer in decoder.layers:
            layer.compile(backend=_compile_backend())
    model = TrainingModel(decoder, plan)
    if ranks.world > 1:
        _shard(model, plan, arch, ranks)
    weights = load_weights(model_dir, arch)
    if plan.lora:
        weights |= adapter if adapter is not None else initial_adapter(decoder, plan.seed, dtype)
    _load(decoder, weights, dtype, ranks, offload=offloads(plan, ranks))
    init_rope(decoder, ranks.device)
    return model


def choose_dtype(plan: Plan, device: torch.device) -> torch.dtype:
    """The plan's dtype, else what suits the device: bf16 on CUDA, fp32 on CPU."""
    if plan.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[plan.dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def offloads(plan: Plan, ranks: Ranks) -> bool:
    """Whether fsdp_cpu_offload has an effect here."""
    return plan.fsdp_cpu_offload and ranks.world > 1 and ranks.device.type == "cuda"


def _compile_backend() -> str:
    """As torchtune chooses it."""
    return os.environ.get("TORCH_COMPILE_BACKEND", "inductor")


def _shard(model: TrainingModel, plan: Plan, arch: Architecture, ranks: Ranks) -> None:
    """FSDP2 as torchtune does it: a unit for each layer and one for the rest. With memory_efficient_fsdp_wrap embedding
    and head are units of their own; they can't be where they are one matrix."""
    separate = ["decoder.tok_embeddings", "decoder.output"] if plan.memory_efficient_fsdp_wrap and not arch.tied else []

    def is_unit(name: str, module: nn.Module) -> bool:
        return bool(get_shard_conditions(name, module, names_to_match=separate))

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    shard_model(cast(TransformerDecoder, model), [is_unit], cpu_offload=offloads(plan, ranks), dp_mesh=mesh)


def _load(
    decoder: TransformerDecoder, weights: dict[str, Tensor], dtype: torch.dtype, ranks: Ranks, *, offload: bool
) -> None:
    placed = {}
    home = torch.device("cpu") if offload else ranks.device
    for name, parameter in decoder.named_parameters():
        full = weights.pop(name).to(dtype)
        # A trained tensor gets memory of its own, aligned the same whatever file it came from: resuming is exact.
        own = full.clone() if parameter.requires_grad and ranks.world == 1 else full
        placed[name] = nn.Parameter(like(own, parameter, home), requires_grad=parameter.requires_grad)
    if weights:
        message = f"weights without a place in the model: {', '.join(sorted(weights))}"
        raise RuntimeError(message)
    decoder.load_state_dict(placed, strict=True, assign=True)


def parameter_count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)

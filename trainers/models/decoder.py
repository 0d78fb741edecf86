"""One builder for every family: an `Architecture` becomes a torchtune `TransformerDecoder`.

torchtune's own builders are not used because they permute q and k, tie head_dim to hidden_size / heads, and have no
rope settings from a config. Parameters carry torchtune's names (`layers.0.attn.q_proj.weight`, ...), those of the norms
behind attention and feed-forward included (`sa_scale.scale`, `mlp_scale.scale`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.modules import (
    FeedForward,
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import LoRALinear

from trainers.errors import UserError
from trainers.models.architecture import Architecture
from trainers.models.attention import Attention, Causal
from trainers.models.rope import RotaryEmbedding
from trainers.plan import LoraSpec

ADAPTER_SUFFIXES = (".lora_a.weight", ".lora_b.weight")


class FusedRMSNorm(RMSNorm):  # type: ignore[misc]  # torchtune ships no types
    """torchtune's RMSNorm without its cast of the input, which keeps PyTorch from its fused kernel in bfloat16.

    That kernel computes in float32 as well: the outputs are the same bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.scale, self.eps)


class GemmaNorm(nn.Module):
    """RMSNorm that multiplies by (1 + scale), in float32 like transformers'."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.scale.shape, 1.0 + self.scale.float(), self.eps).type_as(x)


class CappedTiedLinear(TiedLinear):  # type: ignore[misc]  # torchtune ships no types
    """A tied head whose logits x become c * tanh(x / c)."""

    def __init__(self, tied_module: nn.Module, softcap: float) -> None:
        super().__init__(tied_module)
        self.softcap = softcap

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = super().__call__(x)
        return self.softcap * torch.tanh(logits / self.softcap)


def build_decoder(
    arch: Architecture, *, lora: LoraSpec | None = None, max_seq_len: int | None = None
) -> TransformerDecoder:
    """The decoder of `arch`, with adapters where `lora` asks for them; weights are not loaded.

    Built under the current default device and dtype. Under `torch.device("meta")` nothing is allocated; then load the
    weights with `load_state_dict(..., assign=True)` and call `init_rope(model, device)`. `max_seq_len` (default: the
    architecture's) is the longest sequence, in tokens, that will be fed.

    Raises UserError when `lora` wants an adapter on a head that is tied to the embedding.
    """
    if lora and lora.output and arch.tied:
        raise UserError(
            "invalid_value",
            "apply_lora_to_output can't be used with this model: its output head is tied to its embedding "
            "(tie_word_embeddings), so there is no separate layer to adapt.",
            param="fine_tuning_options.custom_training_options.apply_lora_to_output",
        )
    seq_len = max_seq_len or arch.max_seq_len
    ropes = {params: RotaryEmbedding(params, arch.head_dim, seq_len) for params in {arch.rope, arch.local_rope}}
    tok_embeddings = _embedding(arch)
    return TransformerDecoder(
        tok_embeddings=tok_embeddings,
        layers=nn.ModuleList(
            _layer(arch, window, ropes[arch.rope if window is None else arch.local_rope], lora)
            for window in arch.windows
        ),
        max_seq_len=seq_len,
        num_heads=arch.num_heads,
        head_dim=arch.head_dim,
        norm=_norm(arch, arch.hidden_size),
        output=_head(arch, tok_embeddings, lora),
    )


def causal(model: TransformerDecoder, tokens: Tensor, documents: Tensor | None = None) -> Causal:
    """What the positions of `tokens` [b, s] see: the `mask` of every layer of `model`, or of `model` itself.

    `documents` [b, s] numbers the documents of packed rows, see `Causal`; None: each row is one document.
    """
    return Causal(tokens.shape[1], {layer.attn.rules for layer in model.layers}, tokens.device, documents)


def init_rope(model: nn.Module, device: torch.device | str) -> None:
    """Computes the rotary tables on `device`: for a model that was built on the meta device."""
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.rope_init(device)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA parameters of a model by name; empty for a model without adapters."""
    return {name: p for name, p in model.named_parameters() if name.endswith(ADAPTER_SUFFIXES)}


def initial_adapter(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """First values for every adapter parameter, whole and on the CPU, however `model` is placed (meta, sharded).

    As LoRALinear does it: A is Kaiming-uniform with a = sqrt(5), i.e. uniform within 1 / sqrt(inputs); B is zero, so
    that training starts at the base model. The values depend on `seed` and the model's shapes only: the same on one
    worker and on many, on any device.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _initial_a(parameter.shape, generator).to(dtype)
        if name.endswith(".lora_a.weight")
        else torch.zeros(parameter.shape, dtype=dtype, device="cpu")
        for name, parameter in adapter_parameters(model).items()
    }


def _initial_a(shape: torch.Size, generator: torch.Generator) -> Tensor:
    bound = shape[1] ** -0.5
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def _embedding(arch: Architecture) -> nn.Embedding:
    kind = GemmaNormEmbeddings if arch.gemma_style else nn.Embedding
    return kind(arch.vocab_size, arch.hidden_size)


def _norm(arch: Architecture, width: int) -> nn.Module:
    kind: type[nn.Module] = GemmaNorm if arch.gemma_style else FusedRMSNorm
    return kind(width, eps=arch.norm_eps)


def _head(arch: Architecture, tok_embeddings: nn.Embedding, lora: LoraSpec | None) -> Callable[[Tensor], Tensor]:
    if arch.tied:
        head: Callable[[Tensor], Tensor] = TiedLinear(tok_embeddings)
        return head if arch.final_softcap is None else CappedTiedLinear(tok_embeddings, arch.final_softcap)
    return _linear(arch.hidden_size, arch.vocab_size, bias=False, lora=lora if lora and lora.output else None)


def _layer(
    arch: Architecture, window: int | None, rope: RotaryEmbedding, lora: LoraSpec | None
) -> TransformerSelfAttentionLayer:
    return TransformerSelfAttentionLayer(
        attn=_attention(arch, window, rope, lora),
        mlp=_feed_forward(arch, lora if lora and lora.mlp else None),
        sa_norm=_norm(arch, arch.hidden_size),
        mlp_norm=_norm(arch, arch.hidden_size),
        sa_scale=_norm(arch, arch.hidden_size) if arch.post_norms else None,
        mlp_scale=_norm(arch, arch.hidden_size) if arch.post_norms else None,
    )


def _attention(arch: Architecture, window: int | None, rope: RotaryEmbedding, lora: LoraSpec | None) -> Attention:
    width, queries, keys = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim

    def projection(name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        adapted = lora if lora and name in lora.attn_modules else None
        return _linear(inputs, outputs, bias=bias, lora=adapted)

    return Attention(
        head_dim=arch.head_dim,
        q_proj=projection("q_proj", width, queries, bias=arch.qkv_bias),
        k_proj=projection("k_proj", width, keys, bias=arch.qkv_bias),
        v_proj=projection("v_proj", width, keys, bias=arch.qkv_bias),
        output_proj=projection("output_proj", queries, width, bias=arch.attention_output_bias),
        pos_embeddings=rope,
        window=window,
        scale=arch.attention_scale,
        softcap=arch.attention_softcap,
        dropout=arch.attention_dropout,
        q_norm=_norm(arch, arch.head_dim) if arch.qk_norm else None,
        k_norm=_norm(arch, arch.head_dim) if arch.qk_norm else None,
    )


def _feed_forward(arch: Architecture, lora: LoraSpec | None) -> FeedForward:
    width, ffn, bias = arch.hidden_size, arch.intermediate_size, arch.mlp_bias
    return FeedForward(
        gate_proj=_linear(width, ffn, bias=bias, lora=lora),
        down_proj=_linear(ffn, width, bias=bias, lora=lora),
        up_proj=_linear(width, ffn, bias=bias, lora=lora),
        activation=nn.SiLU() if arch.activation == "silu" else nn.GELU(approximate="tanh"),
    )


def _linear(inputs: int, outputs: int, *, bias: bool, lora: LoraSpec | None) -> nn.Module:
    if lora is None:
        return nn.Linear(inputs, outputs, bias=bias)
    layer: nn.Module = LoRALinear(
        inputs, outputs, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, use_bias=bias
    )
    return layer

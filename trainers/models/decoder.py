"""Builds a torchtune `TransformerDecoder` from an `Architecture`, for every family.

torchtune's own builders are not used because they permute q and k, tie head_dim to hidden_size / heads, and don't take
rope settings from a config. Parameters have torchtune's names (`layers.0.attn.q_proj.weight`, ...), and so do the norms
after attention and feed-forward (`sa_scale.scale`, `mlp_scale.scale`). `architecture.py` says how to add a family; what
its layers compute is chosen here, in `_layer`, `_attention`, `_feed_forward` and `_norm`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchtune.modules import (
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from trainers.models.architecture import Architecture
from trainers.models.attention import Attend, Attention, Causal
from trainers.models.feed_forward import GatedFeedForward
from trainers.models.norm import FusedRMSNorm, GemmaNorm
from trainers.models.rope import RotaryEmbedding
from trainers.training.collate import Layout


class MakeLinear(Protocol):
    """Makes a linear layer of the decoder, of the kind that a fine-tuning method needs. `name` is `attn.q_proj`,
    `attn.k_proj`, `attn.v_proj`, `attn.output_proj`, `mlp.w1`, `mlp.w2`, `mlp.w3`, or `output` (an untied head)."""

    def __call__(self, name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module: ...


class Head(nn.Linear):
    """An untied output head. A loss that needs the weight matrix itself is passed as `use`, because FSDP has gathered
    the whole matrix only while the head's `forward` runs."""

    def forward(self, hidden: Tensor, use: Callable[[Tensor, Tensor], Tensor] = functional.linear) -> Tensor:
        return use(hidden, self.weight)


def plain_linear(name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
    kind = Head if name == "output" else nn.Linear
    return kind(inputs, outputs, bias=bias)


class Embedding(nn.Embedding):
    """The token embedding. Gemma's is multiplied by the square root of its width, in its own dtype."""

    def __init__(self, vocabulary: int, width: int, *, gemma_style: bool) -> None:
        super().__init__(vocabulary, width)
        self._gemma_style = gemma_style

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scaled(super().forward(tokens))

    def scaled(self, rows: Tensor) -> Tensor:
        return rows * torch.tensor(self.embedding_dim**0.5, dtype=rows.dtype) if self._gemma_style else rows


class CappedTiedLinear(TiedLinear):  # type: ignore[misc]  # torchtune ships no types
    """A tied head whose logits x become c * tanh(x / c)."""

    def __init__(self, tied_module: nn.Module, softcap: float) -> None:
        super().__init__(tied_module)
        self.softcap = softcap

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = super().__call__(x)
        return self.softcap * torch.tanh(logits / self.softcap)


class Layer(TransformerSelfAttentionLayer):  # type: ignore[misc]  # torchtune ships no types
    """torchtune's layer, which can compute the outputs of selected positions only."""

    def forward(
        self,
        x: Tensor,
        *,
        mask: Attend | None = None,
        input_pos: Tensor | None = None,
        wanted: Tensor | None = None,
        **_: None,  # torchtune's decoder passes arguments for encoders
    ) -> Tensor:
        """[b, s, d] -> [b, s, d], or [b, n, d] for the positions `wanted` [n] only. `mask` and `input_pos` are as in
        `Attention`."""
        attended = self.attn(self.sa_norm(x), mask=mask, input_pos=input_pos, wanted=wanted)
        hidden: Tensor = self.sa_scale(attended) + (x if wanted is None else x.index_select(1, wanted))
        output: Tensor = hidden + self.mlp_scale(self.mlp(self.mlp_norm(hidden)))
        return output


def build_decoder(
    arch: Architecture, *, linear: MakeLinear = plain_linear, max_seq_len: int | None = None
) -> TransformerDecoder:
    """The decoder of `arch`, without its weights. `linear` makes the layers that a fine-tuning method may change.

    It is built on the current default device and dtype. Under `torch.device("meta")` nothing is allocated; then load
    the weights with `load_state_dict(..., assign=True)` and call `init_rope(model, device)`. `max_seq_len` (default:
    the architecture's) is the longest sequence, in tokens, that the model will be given.
    """
    seq_len = max_seq_len or arch.max_seq_len
    ropes = {params: RotaryEmbedding(params, arch.head_dim, seq_len) for params in {arch.rope, arch.local_rope}}
    tok_embeddings = Embedding(arch.vocab_size, arch.hidden_size, gemma_style=arch.gemma_style)
    return TransformerDecoder(
        tok_embeddings=tok_embeddings,
        layers=nn.ModuleList(
            _layer(arch, window, ropes[arch.rope if window is None else arch.local_rope], linear)
            for window in arch.windows
        ),
        max_seq_len=seq_len,
        num_heads=arch.num_heads,
        head_dim=arch.head_dim,
        norm=_norm(arch, arch.hidden_size),
        output=_head(arch, tok_embeddings, linear),
    )


def causal(model: TransformerDecoder, tokens: Tensor, layout: Layout | None = None) -> Causal:
    """What each position of `tokens` [b, s] attends to: the `mask` argument of `model`, and of each of its layers.

    `layout` describes the documents in a line; None: each line is one document.
    """
    rules = {layer.attn.rules for layer in model.layers}
    dtype = model.tok_embeddings.weight.dtype
    return Causal(tokens.shape[1], rules, tokens.device, layout, head_dim=model.head_dim, dtype=dtype)


def init_rope(model: nn.Module, device: torch.device | str) -> None:
    """Computes the rotary tables on `device`, for a model that was built on the meta device."""
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.rope_init(device)


def rope_table_bytes(arch: Architecture) -> int:
    """Bytes of the rotary tables for sequences of up to `arch.max_seq_len` tokens."""
    return len({arch.rope, arch.local_rope}) * arch.max_seq_len * arch.head_dim * torch.float32.itemsize


def _norm(arch: Architecture, width: int) -> nn.Module:
    kind: type[nn.Module] = GemmaNorm if arch.gemma_style else FusedRMSNorm
    return kind(width, eps=arch.norm_eps)


def _head(arch: Architecture, tok_embeddings: nn.Embedding, linear: MakeLinear) -> Callable[[Tensor], Tensor]:
    if arch.tied:
        head: Callable[[Tensor], Tensor] = TiedLinear(tok_embeddings)
        return head if arch.final_softcap is None else CappedTiedLinear(tok_embeddings, arch.final_softcap)
    return linear("output", arch.hidden_size, arch.vocab_size, bias=False)


def _layer(arch: Architecture, window: int | None, rope: RotaryEmbedding, linear: MakeLinear) -> Layer:
    return Layer(
        attn=_attention(arch, window, rope, linear),
        mlp=_feed_forward(arch, linear),
        sa_norm=_norm(arch, arch.hidden_size),
        mlp_norm=_norm(arch, arch.hidden_size),
        sa_scale=_norm(arch, arch.hidden_size) if arch.post_norms else None,
        mlp_scale=_norm(arch, arch.hidden_size) if arch.post_norms else None,
    )


def _attention(arch: Architecture, window: int | None, rope: RotaryEmbedding, linear: MakeLinear) -> Attention:
    width, queries, keys = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    return Attention(
        head_dim=arch.head_dim,
        q_proj=linear("attn.q_proj", width, queries, bias=arch.qkv_bias),
        k_proj=linear("attn.k_proj", width, keys, bias=arch.qkv_bias),
        v_proj=linear("attn.v_proj", width, keys, bias=arch.qkv_bias),
        output_proj=linear("attn.output_proj", queries, width, bias=arch.attention_output_bias),
        pos_embeddings=rope,
        window=window,
        scale=arch.attention_scale,
        softcap=arch.attention_softcap,
        dropout=arch.attention_dropout,
        q_norm=_norm(arch, arch.head_dim) if arch.qk_norm else None,
        k_norm=_norm(arch, arch.head_dim) if arch.qk_norm else None,
    )


def _feed_forward(arch: Architecture, linear: MakeLinear) -> GatedFeedForward:
    width, ffn, bias = arch.hidden_size, arch.intermediate_size, arch.mlp_bias
    return GatedFeedForward(
        w1=linear("mlp.w1", width, ffn, bias=bias),
        w2=linear("mlp.w2", ffn, width, bias=bias),
        w3=linear("mlp.w3", width, ffn, bias=bias),
        activation=arch.activation,
    )

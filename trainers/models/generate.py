"""Greedy generation for a batch of prompts, with torchtune's KV cache: what the demo and the tests ask a model."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.modules.common_utils import local_kv_cache

MAX_BATCH = 64


@torch.inference_mode()
def generate(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token; the same as generating one prompt at a time.

    An answer ends before the first token of `eos_ids` and has at most `max_new_tokens`. Prompts of similar length
    share a batch; answers come in the order of the prompts. The model is left as it was (mode, caches).

    Raises ValueError for an empty prompt, and where a prompt plus `max_new_tokens` exceeds the model's `max_seq_len`.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: there is nothing to continue")
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if longest > model.max_seq_len:
        raise ValueError(f"prompt and answer take up to {longest} tokens, the model allows {model.max_seq_len}")
    answers: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for rows in _batches(prompts):
            found = _generate_batch(model, [prompts[row] for row in rows], max_new_tokens, eos_ids, pad_id)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
    finally:
        model.train(was_training)
    return answers


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Row numbers, sorted by length of the prompt so that little is padded."""
    rows = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(rows), MAX_BATCH):
        yield rows[start : start + MAX_BATCH]


def _generate_batch(
    model: TransformerDecoder, prompts: list[Sequence[int]], max_new_tokens: int, eos_ids: Collection[int], pad_id: int
) -> list[list[int]]:
    weight = model.tok_embeddings.weight
    width = max(map(len, prompts))
    total = width + max_new_tokens
    pads = torch.tensor([width - len(prompt) for prompt in prompts], device=weight.device)  # [b]
    tokens = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=weight.device)  # [b, width]
    stops = torch.tensor(sorted(eos_ids), dtype=tokens.dtype, device=weight.device)
    answers: list[list[int]] = [[] for _ in prompts]
    done = torch.zeros(len(prompts), dtype=torch.bool, device=weight.device)
    slots = torch.arange(width, device=weight.device)
    with local_kv_cache(
        model,
        batch_size=len(prompts),
        device=weight.device,
        dtype=weight.dtype,
        decoder_max_seq_len=total,
    ):
        for step in range(max_new_tokens):
            tokens = _next_tokens(model, tokens, slots, pads, total)  # [b, 1]
            done |= torch.isin(tokens[:, 0], stops)
            for answer, token, ended in zip(answers, tokens[:, 0].tolist(), done.tolist(), strict=True):
                if not ended:
                    answer.append(token)
            if done.all():
                break
            slots = torch.tensor([width + step], device=weight.device)
    return answers


def _next_tokens(model: TransformerDecoder, tokens: Tensor, slots: Tensor, pads: Tensor, total: int) -> Tensor:
    """Feeds `tokens` [b, s], which take the cache slots `slots` [s]; the most likely next token of each row, [b, 1].

    Prompts are padded on the left by `pads` [b], so a token's position is its slot minus the padding of its row.
    """
    positions = (slots - pads[:, None]).clamp(min=0)  # [b, s]
    mask = _attention_mask(slots, pads, total)
    hidden = model.tok_embeddings(tokens)
    for layer in model.layers:
        hidden = layer(hidden, mask=mask, input_pos=positions)
    # Only the last position is asked for: on a short prompt the head would cost more than a few layers.
    logits: Tensor = model.unembed(hidden[:, -1:])
    return logits.argmax(dim=-1)


def _attention_mask(slots: Tensor, pads: Tensor, total: int) -> Tensor:
    """Which of the `total` cache slots each token sees: bool [b, s, total].

    Those from the row's first real token up to its own. A padding token sees itself, as a softmax over nothing is NaN.
    """
    keys = torch.arange(total, device=slots.device)
    causal = keys <= slots[:, None]  # [s, total]
    real = keys >= pads[:, None, None]  # [b, 1, total]
    return (causal & real) | (keys == slots[:, None])

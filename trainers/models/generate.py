"""Greedy generation for a batch of prompts, with keys and values kept: what the demo and the tests ask a model."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from trainers.models.attention import Rules, attend

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
    share a batch; answers come in the order of the prompts. The model is left in the mode it was in.

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
    caches = [_Cache(len(prompts), total) for _ in model.layers]
    start = 0
    for _ in range(max_new_tokens):
        fed, tokens = tokens.shape[1], _next_tokens(model, tokens, start, pads, caches)  # [b, 1]
        start += fed
        done |= torch.isin(tokens[:, 0], stops)
        for answer, token, ended in zip(answers, tokens[:, 0].tolist(), done.tolist(), strict=True):
            if not ended:
                answer.append(token)
        if done.all():
            break
    return answers


class _Cache:
    """Keys and values of one layer, for `rows` rows of up to `slots` tokens."""

    def __init__(self, rows: int, slots: int) -> None:
        self._shape = (rows, slots)
        self._kept: tuple[Tensor, ...] | None = None  # [b, slots, kv, d] each

    def attend(self, start: int, visible: Tensor, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        """Keeps `k` and `v` [b, s, kv, d] from slot `start` on; the outputs for `q` over all slots so far."""
        if self._kept is None:
            self._kept = tuple(x.new_empty(*self._shape, *x.shape[2:]) for x in (k, v))
        end = start + k.shape[1]
        for kept, new in zip(self._kept, (k, v), strict=True):
            kept[:, start:end] = new
        keys, values = (kept[:, :end] for kept in self._kept)
        return attend(q, keys, values, visible, rules)


def _next_tokens(
    model: TransformerDecoder, tokens: Tensor, start: int, pads: Tensor, caches: Sequence[_Cache]
) -> Tensor:
    """Feeds `tokens` [b, s], which take the slots from `start` on; the most likely next token of each row, [b, 1].

    Prompts are padded on the left by `pads` [b], so a token's position is its slot minus the padding of its row.
    """
    slots = torch.arange(start + tokens.shape[1], device=tokens.device)
    positions = (slots[start:] - pads[:, None]).clamp(min=0)  # [b, s]
    windows = [layer.attn.rules.window for layer in model.layers]
    visible = {window: _visible(slots[start:], slots, pads, window) for window in set(windows)}
    hidden = model.tok_embeddings(tokens)
    for layer, window, cache in zip(model.layers, windows, caches, strict=True):
        hidden = layer(hidden, mask=partial(cache.attend, start, visible[window]), input_pos=positions)
    # Only the last position is asked for: on a short prompt the head would cost more than a few layers.
    logits: Tensor = model.unembed(hidden[:, -1:])
    return logits.argmax(dim=-1)


def _visible(queries: Tensor, keys: Tensor, pads: Tensor, window: int | None) -> Tensor:
    """Which of the slots `keys` [t] the tokens in the slots `queries` [s] see: bool [b, 1, s, t].

    Those from the row's first real token, or from where the window begins, up to its own. A padding token sees itself,
    as a softmax over nothing is NaN.
    """
    distance = queries[:, None] - keys  # [s, t]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    real = keys >= pads[:, None, None]  # [b, 1, t]
    return ((seen & real) | (distance == 0)).unsqueeze(1)

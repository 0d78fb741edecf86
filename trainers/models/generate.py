"""Generation with a key-value cache. `generate`: greedy, for a batch of prompts, used by the demo and the tests.
`advance`: one more token for each of any number of answers, which may join at any time; used by the chat endpoint."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from trainers.answers import Sampling
from trainers.errors import UserError
from trainers.models.attention import Attend, Rules, attend
from trainers.models.rope import Rotation

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
    """The greedy continuation of each prompt, in the order of the prompts. Batching doesn't change an answer.

    An answer ends before the first token of `eos_ids` and has at most `max_new_tokens` tokens. Prompts of similar
    length share a batch. The model is left in the mode (training or eval) it was in.

    Raises ValueError for an empty prompt, or if a prompt plus `max_new_tokens` exceeds the model's `max_seq_len`.
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


class Continuation:
    """The state of one answer: the random generator, the cache, and the tokens to feed next. `advance` adds a token.

    Memory grows with the tokens generated so far, not with `max_new_tokens`. Raises ValueError as `generate` does.
    """

    def __init__(
        self, model: TransformerDecoder, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling
    ) -> None:
        if not prompt:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if (longest := len(prompt) + max_new_tokens) > model.max_seq_len:
            raise ValueError(f"prompt and answer take up to {longest} tokens, the model allows {model.max_seq_len}")
        self.sampling = sampling
        self.random = torch.Generator()
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed)
        self.caches = [_Cache(1, len(prompt)) for _ in model.layers]
        self.known = 0
        """Number of tokens in the caches."""
        self.new: Sequence[int] = prompt
        """The tokens to feed next: at first the prompt, then the last token."""


@torch.inference_mode()
def advance(model: TransformerDecoder, continuations: Sequence[Continuation]) -> list[int | UserError]:
    """Computes one more token of each, or a UserError `model_broken` if the model's output is not a number. `model`
    must be in eval mode.

    All are computed as one line, in which each attends to its own tokens only: reading the weights takes most of the
    time, and so they are read once for all.
    """
    device = model.tok_embeddings.weight.device
    widths = [len(one.new) for one in continuations]
    tokens = torch.tensor([[token for one in continuations for token in one.new]], device=device)  # [1, n]
    slots = [torch.arange(one.known + width, device=device) for one, width in zip(continuations, widths, strict=True)]
    queries = [all_[-width:] for all_, width in zip(slots, widths, strict=True)]
    pads = torch.zeros(1, dtype=torch.long, device=device)
    windows = [layer.attn.rules.window for layer in model.layers]
    visible = {
        window: [_visible(of, keys, pads, window) for of, keys in zip(queries, slots, strict=True)]
        for window in set(windows)
    }

    def attend_each(number: int, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        parts = zip(*(torch.split(x, widths, dim=1) for x in (q, k, v)), strict=True)
        outputs = [
            one.caches[number].attend(one.known, seen, own_q, own_k, own_v, rules)
            for one, seen, (own_q, own_k, own_v) in zip(continuations, visible[windows[number]], parts, strict=True)
        ]
        return torch.cat(outputs, dim=1)

    hidden, positions = model.tok_embeddings(tokens), torch.cat(queries)[None]
    for number, layer in enumerate(model.layers):
        hidden = layer(hidden, mask=_rotating(partial(attend_each, number)), input_pos=positions)
    last = torch.tensor(widths, device=device).cumsum(0) - 1
    logits = model.unembed(hidden[:, last])[0]  # [continuations, vocab]
    # All are chosen before any state changes: if there is too little memory for one, the caller may try again.
    chosen = [_chosen_or_error(of_one, one) for one, of_one in zip(continuations, logits, strict=True)]
    for one, width, token in zip(continuations, widths, chosen, strict=True):
        one.known += width
        if not isinstance(token, UserError):
            one.new = [token]
    return chosen


def _chosen_or_error(logits: Tensor, continuation: Continuation) -> int | UserError:
    try:
        return _chosen(logits, continuation.sampling, continuation.random)
    except UserError as broken:
        return broken


def _chosen(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """One token out of `logits` [vocab]. It is drawn on the CPU, so that a seed means the same on every device.

    Raises UserError `model_broken` if a logit is NaN or the largest is infinite."""
    if not logits.max().isfinite():
        message = "the model's output is not a number or infinite: its weights are broken, as after a run that diverged"
        raise UserError("model_broken", message, "model")
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu()
    # The largest logit is subtracted first and the divisor is at least the smallest normal float32, as a quotient of
    # inf / inf or 0 / 0 would be NaN.
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(descending=True, stable=True)
        left_out = ordered.cumsum(-1) - ordered >= sampling.top_p  # the likelier ones already add up to top_p
        left_out[0] = False
        probabilities = torch.zeros_like(ordered).scatter(0, places, ordered.masked_fill(left_out, 0.0))
    return int(torch.multinomial(probabilities, 1, generator=random))


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of the prompts of each batch, sorted by length so that there is little padding."""
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
        logits = _next_logits(model, tokens, start, pads, caches)
        start += tokens.shape[1]
        tokens = logits.argmax(dim=-1, keepdim=True)  # [b, 1]
        done |= torch.isin(tokens[:, 0], stops)
        for answer, token, ended in zip(answers, tokens[:, 0].tolist(), done.tolist(), strict=True):
            if not ended:
                answer.append(token)
        if done.all():
            break
    return answers


class _Cache:
    """Keys and values of one layer, for `rows` rows of up to `slots` tokens. When it is full, its size doubles."""

    def __init__(self, rows: int, slots: int) -> None:
        self._rows, self._slots = rows, slots
        self._kept: tuple[Tensor, ...] | None = None  # [b, slots, kv, d] each

    def attend(self, start: int, visible: Tensor, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        """Stores `k` and `v` [b, s, kv, d] from slot `start` on; returns the outputs for `q` over all slots so far."""
        end = start + k.shape[1]
        if self._kept is None or end > self._slots:
            slots = max(end, self._slots if self._kept is None else 2 * self._slots)
            grown = tuple(x.new_empty(self._rows, slots, *x.shape[2:]) for x in (k, v))
            for kept, before in zip(grown, self._kept or (), strict=False):
                kept[:, :start] = before[:, :start]
            self._kept, self._slots = grown, slots  # only now: if memory was too short, nothing has changed
        for kept, new in zip(self._kept, (k, v), strict=True):
            kept[:, start:end] = new
        keys, values = (kept[:, :end] for kept in self._kept)
        return attend(q, keys, values, visible, rules)


def _next_logits(
    model: TransformerDecoder, tokens: Tensor, start: int, pads: Tensor, caches: Sequence[_Cache]
) -> Tensor:
    """Feeds `tokens` [b, s], which take the slots from `start` on; returns the logits of the next token of each row,
    [b, vocab].

    Prompts are padded on the left by `pads` [b], so a token's position is its slot minus the padding of its row.
    """
    slots = torch.arange(start + tokens.shape[1], device=tokens.device)
    positions = (slots[start:] - pads[:, None]).clamp(min=0)  # [b, s]
    windows = [layer.attn.rules.window for layer in model.layers]
    visible = {window: _visible(slots[start:], slots, pads, window) for window in set(windows)}
    hidden = model.tok_embeddings(tokens)
    for layer, window, cache in zip(model.layers, windows, caches, strict=True):
        hidden = layer(hidden, mask=_rotating(partial(cache.attend, start, visible[window])), input_pos=positions)
    # Only for the last position: on a short prompt the head would otherwise cost more than a few layers.
    logits: Tensor = model.unembed(hidden[:, -1:])
    return logits[:, -1]


def _rotating(attend_to: Callable[[Tensor, Tensor, Tensor, Rules], Tensor]) -> Attend:
    """`attend_to`, given queries and keys that are rotated already, as the cache keeps them."""

    def rotate_and_attend(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, rules: Rules) -> Tensor:
        return attend_to(rotation(q), rotation(k), v, rules)

    return rotate_and_attend


def _visible(queries: Tensor, keys: Tensor, pads: Tensor, window: int | None) -> Tensor:
    """Which of the slots `keys` [t] the tokens in the slots `queries` [s] attend to: bool [b, 1, s, t].

    A token attends to the slots from the row's first real token, or from the beginning of its window, up to its own. A
    padding token attends to itself, as a softmax over nothing is NaN.
    """
    distance = queries[:, None] - keys  # [s, t]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    real = keys >= pads[:, None, None]  # [b, 1, t]
    return ((seen & real) | (distance == 0)).unsqueeze(1)

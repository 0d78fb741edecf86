"""Turns lines of a data file into tokens. `prepare` distributes this work over processes, chunk by chunk."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from events.facts import LineError
from trainers.data.chat import ChatTokenizer, Rendered
from trainers.data.dataset import MASK_TYPE, TOKEN_TYPE
from trainers.data.dialog import RowError
from trainers.data.rows import parse_pair, parse_row
from trainers.data.words import Encoded

ERRORS_KEPT = 20

Line = tuple[int, bytes]
"""Line number (from 1) and text."""


@dataclass(slots=True)
class Chunk:
    """The result of encoding some lines: the rows that can be trained on, one after the other, and counts of all lines.

    `tokens` and `mask` are bytes as in the files of `trainers.data.dataset`; `lengths` are the tokens of each row. A
    line gives one row or, with preferences, two: chosen, then rejected. `trained` counts trained tokens. `valid`,
    `truncated` and `invalid` count lines; `histogram` counts the valid ones by the length of their (longer) row before
    truncation, rounded up to a power of two. `errors` has the first invalid lines, `truncated_lines` the first
    truncated ones. `partly_shown` counts lines with a message to train on of which the chat template shows only a part;
    `unprompted` counts those with an answer to train on that doesn't continue the generation prompt.
    """

    tokens: bytes = b""
    mask: bytes = b""
    lengths: list[int] = field(default_factory=list)
    valid: int = 0
    trained: int = 0
    truncated: int = 0
    partly_shown: int = 0
    unprompted: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    invalid: int = 0
    errors: list[LineError] = field(default_factory=list)
    truncated_lines: list[int] = field(default_factory=list)


def encode_lines(tokenizer: ChatTokenizer, max_seq_len: int, lines: Sequence[Line], pairs: bool = False) -> Chunk:
    """Reads, renders and tokenises `lines`, each a dialog or (with `pairs`) a row of preferences. Cuts rows off after
    `max_seq_len` tokens."""
    chunk = Chunk()
    read = [_read(raw, tokenizer, pairs) for _, raw in lines]
    encoded = tokenizer.encode_rendered([row for rows in read if not isinstance(rows, RowError) for row in rows])
    all_embedded = _all_embedded(encoded, tokenizer)
    following = iter(encoded)
    tokens: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.bool_]] = []
    for (line, _), rows in zip(lines, read, strict=True):
        cut = chunk.truncated
        try:
            if isinstance(rows, RowError):
                raise rows
            of_line = [next(following) for _ in rows]
            if not all_embedded:
                for ids, _ in of_line:
                    tokenizer.check_embedded(ids[:max_seq_len])
            kept = _admitted(of_line, max_seq_len, chunk)
        except RowError as error:
            chunk.invalid += 1
            if len(chunk.errors) < ERRORS_KEPT:
                chunk.errors.append(LineError(line=line, message=str(error)))
            continue
        if chunk.truncated > cut and len(chunk.truncated_lines) < ERRORS_KEPT:
            chunk.truncated_lines.append(line)
        chunk.partly_shown += any(row.partly_shown for row in rows)
        chunk.unprompted += any(row.unprompted for row in rows)
        for ids, mask in kept:
            tokens.append(ids)
            masks.append(mask)
            chunk.lengths.append(len(ids))
    if tokens:
        chunk.tokens = np.concatenate(tokens).astype(TOKEN_TYPE, copy=False).tobytes()
        chunk.mask = np.concatenate(masks).astype(MASK_TYPE, copy=False).tobytes()
    return chunk


def _read(raw: bytes, tokenizer: ChatTokenizer, pairs: bool) -> list[Rendered] | RowError:
    try:
        return [tokenizer.locate(dialog) for dialog in (parse_pair(raw) if pairs else [parse_row(raw)])]
    except RowError as error:
        return error


def _all_embedded(encoded: Sequence[Encoded], tokenizer: ChatTokenizer) -> bool:
    """Whether the model's embedding has all tokens of all rows. One check is enough for nearly every chunk: hardly any
    tokenizer has tokens that the embedding lacks."""
    try:
        tokenizer.check_embedded(np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in encoded)]))
    except RowError:
        return False
    return True


def _admitted(rows: list[Encoded], max_seq_len: int, chunk: Chunk) -> list[Encoded]:
    """A line's rows as they will be trained on; counts them in `chunk`. Raises RowError if one can't be trained on."""
    for (_, mask), side in zip(rows, ("chosen", "rejected"), strict=False):
        mask[:1] = False  # nothing predicts the first token
        if not mask[:max_seq_len].any():
            raise RowError(_nothing_left(mask, max_seq_len) + (f" (in {side})" if len(rows) > 1 else ""))
    kept = [(tokens[:max_seq_len], mask[:max_seq_len]) for tokens, mask in rows]
    longest = max(len(tokens) for tokens, _ in rows)
    if len(rows) > 1 and all(map(np.array_equal, *kept)):
        same = "chosen and rejected are the same once the chat template has made text of them"
        cut = f"truncation leaves chosen and rejected the same, max_seq_len is {max_seq_len}"
        raise RowError(f"{cut if longest > max_seq_len else same}: there is nothing to prefer")
    chunk.valid += 1
    chunk.trained += sum(int(np.count_nonzero(mask)) for _, mask in kept)
    chunk.truncated += longest > max_seq_len
    chunk.histogram[1 << (longest - 1).bit_length()] += 1
    return kept


def _nothing_left(mask: NDArray[np.bool_], max_seq_len: int) -> str:
    if not mask.any():
        return "nothing to train on: the messages to train on are empty"
    first = int(mask.argmax()) + 1
    return f"truncation leaves nothing to train on: the first trained token is at {first}, max_seq_len is {max_seq_len}"

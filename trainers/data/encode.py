"""Lines of a data file become tokens: the work that `prepare` shares out, chunk by chunk."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from events.facts import LineError
from trainers.data.chat import ChatTokenizer, Rendered
from trainers.data.dataset import MASK_TYPE, TOKEN_TYPE
from trainers.data.dialog import RowError, parse_row
from trainers.data.words import Encoded

ERRORS_KEPT = 20

Line = tuple[int, bytes]
"""Its number, and the text."""


@dataclass(slots=True)
class Chunk:
    """What became of some lines: the rows that can be trained on, behind one another, and what is to be said of all.

    `tokens` and `mask` are bytes as in the files of `trainers.data.dataset`; `lengths` their tokens by row. `histogram`
    counts rows by the next power of two of their length before truncation. `errors` are the first of the `invalid`.
    """

    tokens: bytes = b""
    mask: bytes = b""
    lengths: list[int] = field(default_factory=list)
    trained: int = 0
    truncated: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    invalid: int = 0
    errors: list[LineError] = field(default_factory=list)


def encode_lines(tokenizer: ChatTokenizer, max_seq_len: int, lines: Sequence[Line]) -> Chunk:
    """Reads, renders and tokenises `lines`. A row longer than `max_seq_len` tokens loses its end."""
    chunk = Chunk()
    rows = [_read(raw, tokenizer) for _, raw in lines]
    encoded = iter(tokenizer.encode_rendered([row for row in rows if isinstance(row, Rendered)]))
    tokens: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.bool_]] = []
    for (line, _), row in zip(lines, rows, strict=True):
        try:
            ids, mask = _admitted(next(encoded) if isinstance(row, Rendered) else row, max_seq_len, chunk)
        except RowError as error:
            chunk.invalid += 1
            if len(chunk.errors) < ERRORS_KEPT:
                chunk.errors.append(LineError(line=line, message=str(error)))
            continue
        tokens.append(ids)
        masks.append(mask)
        chunk.lengths.append(len(ids))
    if tokens:
        chunk.tokens = np.concatenate(tokens).astype(TOKEN_TYPE, copy=False).tobytes()
        chunk.mask = np.concatenate(masks).astype(MASK_TYPE, copy=False).tobytes()
    return chunk


def _read(raw: bytes, tokenizer: ChatTokenizer) -> Rendered | RowError:
    try:
        return tokenizer.locate(parse_row(raw))
    except RowError as error:
        return error


def _admitted(row: Encoded | RowError, max_seq_len: int, chunk: Chunk) -> Encoded:
    """The row as it will be trained on, counted in `chunk`. Raises RowError for one that can't be."""
    if isinstance(row, RowError):
        raise row
    tokens, mask = row
    mask[:1] = False  # nothing predicts the first token
    length = len(tokens)
    kept = int(np.count_nonzero(mask[:max_seq_len]))
    if kept == 0:
        raise RowError(_nothing_left(mask, max_seq_len))
    chunk.trained += kept
    chunk.truncated += length > max_seq_len
    chunk.histogram[1 << (length - 1).bit_length()] += 1
    return tokens[:max_seq_len], mask[:max_seq_len]


def _nothing_left(mask: NDArray[np.bool_], max_seq_len: int) -> str:
    if not mask.any():
        return "nothing to train on: the messages to train on are empty"
    first = int(mask.argmax()) + 1
    return f"truncation leaves nothing to train on: the first trained token is at {first}, max_seq_len is {max_seq_len}"

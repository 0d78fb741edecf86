"""What a model is asked and what it answers, as it crosses processes: the API, which has no torch, knows these."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from events.facts import JobError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The same seed, prompt and model give the same answer on one kind of device."""

    temperature: float = 1.0
    """What logits are divided by. 0: always the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities add up to this; always at least one."""
    seed: int | None = None
    """None: another answer each time."""


@dataclass(frozen=True)
class Question:
    model: str
    """What `trainers.models.resolve.resolve_model` takes. A checkpoint is named by its directory."""
    messages: tuple[dict[str, Any], ...]
    """As chat templates take them: `trainers.data.dialog.Dialog.messages`."""
    max_tokens: int | None = None
    """None: as many as the model's context leaves."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, before them."""
    sampling: Sampling = field(default_factory=Sampling)


class Accepted(NamedTuple):
    """Somebody works on the question. The model may still have to be loaded, or fetched."""


class Begun(NamedTuple):
    """The model is there and the question fits it."""

    prompt_tokens: int


class Piece(NamedTuple):
    """Some more of the answer."""

    text: str
    tokens: int
    """Of the answer so far."""
    end: Literal["stop", "length"] | None = None
    """On the last piece, and only there: the model or a stop text ended it, or there was no room for more."""


class Failed(NamedTuple):
    """There is no answer, or no more of it."""

    error: JobError


Part = Accepted | Begun | Piece | Failed


class Answers(Protocol):
    """Whoever answers questions."""

    def answer(self, question: Question) -> AsyncGenerator[Part, None]:
        """Accepted, Begun, Pieces; a Failed may come instead of any of them, as the last one. Closing the generator
        stops the work within one token."""
        ...

"""Questions to models and the parts of their answers, as they are sent between processes. Imports no torch, because the
API uses it."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from events.facts import JobError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The same seed, prompt and model give the same answer on one kind of device."""

    temperature: float = 1.0
    """Logits are divided by this. 0: always the likeliest token."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens whose probabilities add up to this, at least one."""
    seed: int | None = None
    """None: a different answer each time."""


@dataclass(frozen=True)
class Question:
    """A dialog that a model is to continue."""

    model: str
    """A name as `trainers.models.resolve.resolve_model` takes it; for a checkpoint, its directory."""
    messages: tuple[dict[str, Any], ...]
    """In the form that chat templates take: `trainers.data.dialog.Dialog.messages`."""
    max_tokens: int | None = None
    """None: as many as the model's context leaves."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    sampling: Sampling = field(default_factory=Sampling)


class Accepted(NamedTuple):
    """A process has taken the question. It may still have to fetch or load the model."""


class Begun(NamedTuple):
    """The model is loaded, and the prompt fits into its context."""

    prompt_tokens: int


class Piece(NamedTuple):
    """The next piece of the answer."""

    text: str
    tokens: int
    """Tokens of the answer so far."""
    end: Literal["stop", "length"] | None = None
    """Only on the last piece. `stop`: the model or a stop text ended the answer; `length`: it reached its limit."""


class Failed(NamedTuple):
    """The last part of an answer that failed before or after it began."""

    error: JobError


Part = Accepted | Begun | Piece | Failed


class Answers(Protocol):
    """Answers questions."""

    def answer(self, question: Question) -> AsyncGenerator[Part, None]:
        """Yields Accepted, Begun and then Pieces. Instead of any of them a Failed may come, as the last part. Closing
        the generator stops the work within one token."""
        ...

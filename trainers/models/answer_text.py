"""Turns a question into the prompt's tokens, and the answer's tokens into text while they are generated."""

from collections.abc import Sequence

from trainers.answers import Piece, Question
from trainers.data.chat import ChatTokenizer
from trainers.data.dialog import RowError
from trainers.errors import UserError

_UNFINISHED = "\ufffd"  # a character whose bytes are not all there yet decodes to this


def encode_question(question: Question, tokenizer: ChatTokenizer, context: int) -> list[int]:
    """The prompt's tokens, made with the model's chat template.

    Raises UserError (param `messages`) if the template refuses the messages, if the model's embedding has no row for a
    token, or if prompt and answer don't fit into the `context`, which is in tokens.
    """
    try:
        prompt = tokenizer.encode_prompt(question.messages)
    except RowError as error:
        raise UserError("invalid_messages", f"{error}", "messages") from None
    if len(prompt) + (question.max_tokens or 1) > context:
        answer, less = "", "shorten them"
        if question.max_tokens:
            answer, less = f", the answer up to {question.max_tokens}", "shorten them, or lower max_completion_tokens"
        message = f"the model's context is {context} tokens, and the messages take {len(prompt)}{answer}: {less}"
        raise UserError("context_length_exceeded", message, "messages")
    return prompt


class AnswerText:
    """Decodes an answer token by token, at a cost per token that does not grow with the answer.

    Characters are held back while they may still change, or may be the beginning of a stop text.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str], max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._max_tokens = max_tokens
        self._tokens = 0
        self._window: list[int] = []  # the tokens that were decoded last, and those after them
        self._decoded = 0  # how many tokens of the window have final text
        self._text = ""  # the end of that text; it contains every character that was not sent yet
        self._sent = 0  # how many characters of `_text` were sent

    def add(self, token: int) -> Piece:
        """Takes the answer's next token; returns the text that can be sent now. Not to be called after a piece that has
        an `end`."""
        ended = token in self._tokenizer.eos_ids
        if not ended:
            self._tokens += 1
            self._window.append(token)
        text = self._text + self._undecoded()
        if (end := _stopped(text, self._stop, self._sent)) is not None:
            return Piece(text[self._sent : end], self._tokens, "stop")
        if ended or self._tokens == self._max_tokens:
            return Piece(text[self._sent :], self._tokens, "stop" if ended else "length")
        ready = max(self._sent, len(text) - _held_back(text, self._stop))
        piece = Piece(text[self._sent : ready], self._tokens)
        self._sent = ready
        if not text.endswith(_UNFINISHED) and len(text) > len(self._text):
            self._text, self._sent = text[ready:], 0
            self._window, self._decoded = self._window[self._decoded :], len(self._window) - self._decoded
        return piece

    def _undecoded(self) -> str:
        """The text of the window's tokens after the first `_decoded`. These are decoded with the others before them,
        because some tokenizers drop the blank that the first token begins with."""
        decode = self._tokenizer.decode
        return decode(self._window)[len(decode(self._window[: self._decoded])) :]


def _stopped(text: str, stop: Sequence[str], sent: int) -> int | None:
    """The index at which the first stop text begins, or None. It can't begin within the characters already `sent`."""
    found = [at for word in stop if (at := text.find(word, sent)) >= 0]
    return min(found, default=None)


def _held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end must not be sent yet: unfinished ones, and before them the possible beginning of a
    stop text."""
    whole = text.rstrip(_UNFINISHED)
    begun = max(
        (n for word in stop for n in range(1, len(word)) if whole.endswith(word[:n])),
        default=0,
    )
    return len(text) - len(whole) + begun

"""Between a question's text and a model's tokens: the prompt before, and the text of the answer's tokens after."""

from collections.abc import Sequence

from trainers.answers import Piece, Question
from trainers.data.chat import ChatTokenizer
from trainers.data.dialog import RowError
from trainers.errors import UserError

_UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


def encode_question(question: Question, tokenizer: ChatTokenizer, context: int) -> list[int]:
    """The tokens that the answer starts from: the template that the model was trained with.

    Raises UserError (param `messages`) where the template refuses them, the model's embedding has no row for a token,
    or its `context`, in tokens, has no room for them and the answer.
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
    """The text of an answer whose tokens come one by one. What a token costs does not grow with the answer.

    Characters are held back while they may yet change or turn out to begin a stop text.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str], max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._max_tokens = max_tokens
        self._tokens = 0
        self._window: list[int] = []  # the tokens that were decoded last, and those since
        self._decoded = 0  # tokens of the window whose text is known
        self._text = ""  # of what is known, the end: from where the piece before the last one began, at the latest
        self._sent = 0  # characters of it

    def add(self, token: int) -> Piece:
        """What the next `token` adds to the text. Nothing may follow a piece that has an `end`."""
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
        """The text of the window's last tokens. They are decoded after others that have a text, as some tokenizers
        leave out the blank that the very first one begins with."""
        decode = self._tokenizer.decode
        return decode(self._window)[len(decode(self._window[: self._decoded])) :]


def _stopped(text: str, stop: Sequence[str], sent: int) -> int | None:
    """Where the first of the stop texts begins; None where there is none. None begins in what was `sent` already."""
    found = [at for word in stop if (at := text.find(word, sent)) >= 0]
    return min(found, default=None)


def _held_back(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters may yet change, or be the beginning of a stop text: that of a character, and what
    comes before it, which may go on with that one."""
    whole = text.rstrip(_UNFINISHED)
    begun = max(
        (n for word in stop for n in range(1, len(word)) if whole.endswith(word[:n])),
        default=0,
    )
    return len(text) - len(whole) + begun

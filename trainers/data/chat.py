"""A model's tokenizer and chat template: turns dialogs into token ids with an exact loss mask.

Only what the chat template writes can become a control token. Text of a row that looks like one (`<|im_end|>`) is
tokenised as plain characters; such rows take a slower path, with otherwise the same result. One exception: if `<think>`
is a control token, it is one in the assistant's text, too, because templates look for it there.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import Sequence as NoProcessing

from trainers.data.dialog import Dialog, RowError
from trainers.data.spans import Span, SpanFinder, Traced
from trainers.data.template import DEFAULT_TEMPLATE, ChatTemplate, Turn, find_templates
from trainers.data.words import LONG_TEXT, Encoded, WordTokenizer, cuts_between_words
from trainers.errors import UserError
from trainers.models.model_files import read_json_object

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_UNUSUAL = "\ua66e \U00013000 \U0010fffd"  # a rare letter, a hieroglyph, and a private-use character
# Noncharacters, as in spans.py, make the placeholders for a user's text that looks like a control token.
_ESCAPE = "\ufdd2{}\ufdd3"
_ESCAPES = re.compile("\ufdd2(\\d+)\ufdd3")
_RESERVED = re.compile("[\ufdd0-\ufdd3]")
_OF_THOUGHTS = ("<think>", "</think>")
_ANSWERED = Dialog(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), (False, True))


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialog as text. `trained`: its trained characters. `control`: its control tokens (start, end, token id); None
    if the tokenizer can find them itself, because no text of the user looks like one. `partly_shown` and `unprompted`
    are those of `spans.Traced`."""

    text: str
    trained: list[Span]
    control: list[tuple[int, int, int]] | None = None
    partly_shown: bool = False
    unprompted: bool = False


class ChatTokenizer:
    """Create it with `from_dir`. Immutable, apart from caches; use one per thread. Can be pickled."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: Mapping[str, str],
        named: Mapping[str, str],
        eos_ids: Sequence[int],
        vocab_size: int | None = None,
    ) -> None:
        """`named`: special tokens by name, `eos_token` among them. Without `templates`, DEFAULT_TEMPLATE is used."""
        self.vocab_size = vocab_size
        """Rows of the model's embedding; None if config.json is missing or doesn't say."""
        self.has_own_template = bool(templates)
        if not templates:
            begins = _adds_bos(tokenizer, named.get("bos_token"))
            templates = {"default": ("{{ bos_token }}" if begins else "") + DEFAULT_TEMPLATE}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The template writes BOS and EOS. A ByteLevel post-processor would also trim blanks off the offsets.
        tokenizer.post_processor = NoProcessing([])
        self._tokenizer = tokenizer
        self._words = WordTokenizer(tokenizer) if cuts_between_words(tokenizer) else None
        self._named, self._given_eos_ids = dict(named), tuple(eos_ids)
        self._template = ChatTemplate(templates, named)
        _make_end_special(tokenizer, self._template)
        self._special = [token for token in tokenizer.get_added_tokens_decoder().items() if token[1].special]
        self._ids = {token.content: id_ for id_, token in self._special}
        self._names = sorted(self._ids, key=len, reverse=True)
        self._silent = {id_ for name, id_ in self._ids.items() if name not in _OF_THOUGHTS}
        self._takes_blanks = tuple(token.content for _, token in self._special if token.rstrip)
        self._control = _any_of(self._names)
        never_words = _any_of([name for name in self._names if name not in _OF_THOUGHTS])
        self._user_control = re.compile(f"{self._control.pattern}|{_RESERVED.pattern}")
        self._assistant_control = re.compile(f"{never_words.pattern}|{_RESERVED.pattern}")
        self._spans = SpanFinder(self._template, never_words)
        eos = self._ids[named["eos_token"]]
        end = self._assistant_end()
        self.ends_turns = bool(end)
        """Whether a control token ends an assistant's turn. If not, the model isn't trained to stop."""
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_ids, eos, *end]))
        """Ids that end generation, each once: those in the model's configs, EOS, and what ends an assistant's turn."""
        self.pad_id: int = self._ids.get(named.get("pad_token", ""), eos)
        """Id to pad with: the pad token, or EOS if there is none."""

    @classmethod
    def from_dir(cls, model_dir: Path, *, whole: bool = True) -> Self:
        """Reads tokenizer.json and the configs beside it. Raises UserError (param `model`) for what is missing.

        Not `whole`: only the template and `eos_ids` will be used. tokenizer.json, which takes 40 MB of memory for a
        vocabulary of fifty thousand words, is then read only if the configs don't list the token that ends an
        assistant's turn.
        """
        config = _read_json(model_dir / "tokenizer_config.json")
        templates = find_templates(model_dir, config)
        named = _named_tokens(model_dir, config)
        tokenizer = None if whole or not templates else _control_tokens(config, named)
        whole = tokenizer is None
        tokenizer = tokenizer or _read_tokenizer(model_dir / "tokenizer.json")
        vocab_size = _read_json(model_dir / "config.json").get("vocab_size")
        eos_ids = [*_eos_ids(model_dir / "generation_config.json"), *_eos_ids(model_dir / "config.json")]
        if "eos_token" not in named and eos_ids:
            named["eos_token"] = tokenizer.id_to_token(eos_ids[0]) or ""
        _declare_special(tokenizer, [*named.values(), *_extra_tokens(config)])
        if whole:
            _check_takes_any_text(tokenizer)
        if tokenizer.token_to_id(named.get("eos_token", "")) is None:
            raise _broken("the model's tokenizer has no end-of-sequence token")
        found = cls(tokenizer, templates, named, eos_ids, vocab_size if isinstance(vocab_size, int) else None)
        return found if whole or found.ends_turns else cls.from_dir(model_dir)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self._tokenizer, self._template.sources, self._named, self._given_eos_ids, self.vocab_size)
        return type(self), arguments, {"has_own_template": self.has_own_template}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything outside this program that the tokens of a dialog depend on, and of the number of tokens
        that the model has."""
        parts = [self._tokenizer.to_str(), self._template.sources, self._named, self.vocab_size]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def template(self) -> str:
        """The Jinja source in use; if there are several, the one for dialogs without tools. If `has_own_template` is
        false, it must be saved with the model that was trained with it."""
        return self._template.sources["default"]

    def render(
        self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """The dialog as the model sees it, control tokens included. Raises RowError if the template refuses it."""
        return self._template.render(messages, tools, add_generation_prompt=add_generation_prompt)

    @property
    def cue(self) -> str:
        """What the generation prompt adds after a user's message; "" if the template adds nothing."""
        return self._spans.cue([{"role": "user", "content": "a"}])

    def locate(self, dialog: Dialog) -> Rendered:
        """The first half of `encode`, for one dialog. Raises RowError for a dialog this model can't be trained on."""
        if not self._looks_like_control(dialog):
            traced = self._spans.render(dialog)
            return Rendered(traced.text, self._trained(traced), None, traced.partly_shown, traced.unprompted)
        messages, tools = self._escaped(dialog.messages, dialog.tools)
        traced = self._spans.render(Dialog(messages, dialog.keep_loss, tools))
        rendered = self._unescape(traced.text, self._trained(traced))
        return replace(rendered, partly_shown=traced.partly_shown, unprompted=traced.unprompted)

    def encode_rendered(self, batch: Sequence[Rendered]) -> list[Encoded]:
        """The second half of `encode`: tokens and masks. Long texts are encoded one by one, to save memory."""
        if self._words is not None:
            easy = [r for r in batch if r.control is None]
            done = iter(self._words.encode([r.text for r in easy], [r.trained for r in easy]))
            return [next(done) if r.control is None else self._encode_hard(r) for r in batch]
        short = [r.text for r in batch if r.control is None and len(r.text) <= LONG_TEXT]
        together = iter(self._tokenizer.encode_batch(short, add_special_tokens=False))
        encoded = []
        for r in batch:
            if r.control is not None:
                encoded.append(self._encode_hard(r))
            elif len(r.text) <= LONG_TEXT:
                encoded.append(_mask_one(next(together), r.trained))
            else:
                encoded.append(_mask_one(self._tokenizer.encode(r.text, add_special_tokens=False), r.trained))
        return encoded

    def encode(self, dialogs: Sequence[Dialog]) -> list[Encoded]:
        """Token ids and loss mask of each dialog, not truncated. Raises RowError at the first bad one."""
        return self.encode_rendered([self.locate(dialog) for dialog in dialogs])

    def encode_prompt(self, messages: Sequence[Turn]) -> list[int]:
        """Token ids of the prompt for an assistant's answer to `messages`. Raises RowError if the template refuses the
        messages, and as `check_embedded` does."""
        escaped, no_tools = self._escaped(messages, ())
        rendered = self._unescape(self.render(escaped, no_tools, add_generation_prompt=True), [])
        ids = self._encode_hard(rendered)[0]
        self.check_embedded(ids)
        return list(ids.tolist())

    def check_embedded(self, ids: NDArray[np.int32]) -> None:
        """Raises RowError if the model's embedding has no row for one of `ids`: tokens were added to the tokenizer, but
        the embedding wasn't resized."""
        if self.vocab_size is not None and (beyond := ids[ids >= self.vocab_size]).size:
            first = int(beyond[0])
            raise RowError(
                f"the token {self._tokenizer.id_to_token(first)!r} ({first}) is beyond the model's embedding, which "
                f"has {self.vocab_size} rows: resize the model's embeddings"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without control tokens, except <think> and </think>."""
        return self._tokenizer.decode([id_ for id_ in ids if id_ not in self._silent], skip_special_tokens=False)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each of `ids`, control tokens by name; joined, they are the text of all. If a character takes
        several tokens, the last one has it and the others are empty."""
        found: list[str] = []
        begin = done = 0  # ids[begin:done] are decoded again, so that what follows keeps its leading blank
        for end in range(1, len(ids) + 1):
            before, now = (
                self._tokenizer.decode(list(ids[begin:stop]), skip_special_tokens=False) for stop in (done, end)
            )
            if now.endswith("\ufffd") and end < len(ids):
                found.append("")
                continue
            found.append(now[len(before) :])
            begin, done = done, end
        return found

    def _assistant_end(self) -> list[int]:
        end = self._spans.turn_end(_ANSWERED, "assistant").strip()
        return [self._ids[end]] if end else []

    def _trained(self, traced: Traced) -> list[Span]:
        """The trained characters, without empty answers that no token ends, and without blanks that belong to the
        control token before them (Phi 3's headers include all blanks that follow): training those would train the
        header."""
        found = []
        for start, end in traced.trained:
            before = start
            while self._takes_blanks and before and traced.text[before - 1].isspace():
                before -= 1
            if traced.text.endswith(self._takes_blanks, 0, before):
                while start < end and traced.text[start].isspace():
                    start += 1
            if start < end:
                found.append((start, end))
        return found

    def _looks_like_control(self, dialog: Dialog) -> bool:
        # A fast path: most messages have only role and content.
        simple = not dialog.tools and all(len(message) == 2 for message in dialog.messages)
        texts = (m["content"] for m in dialog.messages) if simple else [_flat([dialog.messages, dialog.tools])]
        control, reserved = self._control.search, _RESERVED.search
        return any(control(text) or (not text.isascii() and reserved(text)) for text in texts)

    def _escaped(self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
        turns: list[Turn] = []
        for message in messages:
            of_assistant = message["role"] == "assistant"
            content = self._escape(message["content"], self._assistant_control if of_assistant else self._user_control)
            turns.append(_map_text({**message, "content": ""}, self._escape) | {"content": content})
        return tuple(turns), _map_text(tuple(tools), self._escape)

    def _escape(self, text: str, control: re.Pattern[str] | None = None) -> str:
        """`text` with a placeholder for each match of `control` (by default: what looks like a control token)."""

        def stand_in(match: re.Match[str]) -> str:
            if match.group() not in self._ids:
                raise RowError(f"the text contains the noncharacter U+{ord(match.group()):04X}, which is reserved")
            return _ESCAPE.format(self._ids[match.group()])

        return (control or self._user_control).sub(stand_in, text)

    def _unescape(self, text: str, spans: list[Span]) -> Rendered:
        """Replaces the placeholders by the user's text. What is a control token before that stays one."""
        control = [match.span() for match in self._control_with_blanks.finditer(text)]
        names = {str(id_): token.content for id_, token in self._special}
        pieces: list[str] = []
        shifts: list[tuple[int, int]] = []  # (offset in `text`, characters added up to there)
        done = added = 0
        for match in _ESCAPES.finditer(text):
            name = names[match.group(1)]
            pieces += text[done : match.start()], name
            done = match.end()
            added += len(name) - len(match.group())
            shifts.append((done, added))
        pieces.append(text[done:])
        starts, totals = np.array([(0, 0), *shifts], dtype=np.int64).T

        def moved(span: Span) -> Span:
            start, end = (at + int(totals[np.searchsorted(starts, at, "right") - 1]) for at in span)
            return start, end

        ids = [self._ids[text[start:end].strip()] for start, end in control]
        found = [(*moved(span), id_) for span, id_ in zip(control, ids, strict=True)]
        return Rendered("".join(pieces), [moved(span) for span in spans], found)

    @cached_property
    def _control_with_blanks(self) -> re.Pattern[str]:
        """As `_control`, with the blanks that some tokens include on their left or right."""
        flags = {token.content: token for _, token in self._special}
        return re.compile(
            "|".join(
                (r"\s*" if flags[name].lstrip else "") + re.escape(name) + (r"\s*" if flags[name].rstrip else "")
                for name in self._names
            )
        )

    @cached_property
    def _literal(self) -> tuple[Tokenizer, Tokenizer]:
        """Tokenizers that treat control tokens as plain text: one for the beginning of a dialog, one for the rest."""
        first = Tokenizer.from_str(self._tokenizer.to_str())
        spec = json.loads(self._tokenizer.to_str())
        for part in _parts(spec.get("pre_tokenizer")):
            if part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
        later = Tokenizer.from_str(json.dumps(spec))
        first.encode_special_tokens = later.encode_special_tokens = True
        return first, later

    def _encode_hard(self, rendered: Rendered) -> Encoded:
        """Tokenises the text between control tokens separately, so that nothing in it can be taken for one."""
        ids: list[NDArray[np.int32]] = []
        masks: list[NDArray[np.bool_]] = []
        position = 0
        for start, end, control in [*(rendered.control or ()), (len(rendered.text), len(rendered.text), None)]:
            if position < start:
                tokenizer = self._literal[position > 0]
                piece = tokenizer.encode(rendered.text[position:start], add_special_tokens=False)
                local = [
                    (max(a - position, 0), b - position) for a, b in rendered.trained if b > position and a < start
                ]
                tokens, mask = _mask_one(piece, local)
                ids.append(tokens)
                masks.append(mask)
            if control is not None:
                ids.append(np.array([control], dtype=np.int32))
                masks.append(np.array([any(a < end and b > start for a, b in rendered.trained)]))
            position = end
        if not ids:
            return np.empty(0, np.int32), np.empty(0, np.bool_)
        return np.concatenate(ids), np.concatenate(masks)


def _mask_one(encoding: Encoding, trained: Sequence[Span]) -> Encoded:
    """Marks every token that shares a character with a trained span."""
    ids = np.array(encoding.ids, dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.bool_)
    for start, end in trained:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:
            mask |= _overlaps(encoding.offsets, start, end)
            continue
        # A character of several bytes may be several tokens; char_to_token returns the first.
        while (following := encoding.token_to_chars(last + 1)) and following[0] < end:
            last += 1
        mask[first : last + 1] = True
    return ids, mask


def _overlaps(offsets: Sequence[Span], start: int, end: int) -> NDArray[np.bool_]:
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    empty_inside = (starts == ends) & (starts >= start) & (starts < end)
    overlap: NDArray[np.bool_] = ((starts < end) & (ends > start) & (starts < ends)) | empty_inside
    return overlap


def _flat(value: object) -> str:
    """All strings in `value`, in one string."""
    return json.dumps(value, ensure_ascii=False)


def _map_text(value: Any, change: Any) -> Any:  # noqa: ANN401  -- any JSON value
    """`value` with `change` applied to every string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_text(item, change) for item in value)
    return value


def _parts(spec: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if spec:
        yield spec
        for part in spec.get("pretokenizers", ()):
            yield from _parts(part)


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise _broken("the model directory has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  -- it raises bare Exception for a file it can't read, or panics
        raise _broken(f"the model's tokenizer.json can't be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _eos_ids(path: Path) -> list[int]:
    """`eos_token_id` of a config, which is one id or a list; empty if the key or the file is missing."""
    entry = _read_json(path).get("eos_token_id")
    if entry is None:
        return []
    ids = entry if isinstance(entry, list) else [entry]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) and 0 <= id_ < 2**31 for id_ in ids):
        raise _broken(f"eos_token_id of the model's {path.name} must be a token id or a list of them")
    return ids


def _broken(message: str) -> UserError:
    return UserError("model_incomplete", message, "model")


def _text_of(token: object) -> str | None:
    """The text of a token in a config: a string, or an object with `content`; None if it is neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _control_tokens(config: Mapping[str, Any], named: Mapping[str, str]) -> Tokenizer | None:
    """A tokenizer that has only the control tokens that tokenizer_config.json lists; None if EOS isn't among them, or
    the list is broken."""
    decoder = config.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    try:
        ids = {entry["content"]: int(id_) for id_, entry in entries if isinstance(entry, dict) and entry.get("special")}
        if named.get("eos_token") not in ids:
            return None
        tokenizer = Tokenizer(WordLevel(ids, unk_token=named["eos_token"]))
    except (KeyError, TypeError, ValueError):  # no content, or none that is a string; no id
        return None
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ids])
    return tokenizer


def _named_tokens(model_dir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    entries = _read_json(model_dir / "special_tokens_map.json") | dict(config)
    tokens = {name: _text_of(entries.get(name)) for name in _NAMED_TOKENS}
    return {name: text for name, text in tokens.items() if text}


def _extra_tokens(config: Mapping[str, Any]) -> list[str]:
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise _broken("added_tokens_decoder of the model's tokenizer_config.json must be an object")
    special = [entry for entry in decoder.values() if isinstance(entry, dict) and entry.get("special")]
    extra = config.get("additional_special_tokens") or []
    if not isinstance(extra, list):
        raise _broken("additional_special_tokens of the model's tokenizer_config.json must be a list")
    return [text for entry in [*special, *extra] if (text := _text_of(entry))]


def _declare_special(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Makes control tokens of those `tokens` that are in the vocabulary and aren't any yet, as transformers does."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for token in dict.fromkeys(tokens):
        if token not in special and tokenizer.token_to_id(token) is not None:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _make_end_special(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Makes a control token of the one that ends an assistant's turn, if it is an ordinary added token. Otherwise text
    of a row could end a turn, and answers would be shown with it."""
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values() if token.content.strip()}
    end = SpanFinder(template, _any_of(sorted(added, key=len, reverse=True))).turn_end(_ANSWERED, "assistant").strip()
    token = added.get(end)
    if token is not None and not token.special:
        flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        tokenizer.add_special_tokens([AddedToken(end, special=True, **flags)])


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)))


def _check_takes_any_text(tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer that fails on unknown text because it has no unk_token: without this check it
    would fail in the middle of the data."""
    try:
        tokenizer.encode(_UNUSUAL, add_special_tokens=False)
    except Exception as error:  # noqa: BLE001  -- it raises nothing else
        message = f"the model's tokenizer.json can't encode every text: {error}"
        raise UserError("model_unsupported", message, "model", suggestion="add an unk_token to it") from None


def _adds_bos(tokenizer: Tokenizer, bos: str | None) -> bool:
    """Whether the tokenizer itself puts BOS at the beginning of a text."""
    return bos is not None and tokenizer.encode("a").ids[:1] == [tokenizer.token_to_id(bos)]

"""Which characters of a rendered dialog are trained on.

The trained text of a kept message is what its speaker wrote (content and tool calls) and the token that ends the turn;
never the header before it, never the line break after it. Templates don't say where that is, so it is found by
experiment: render the dialog again with the contents replaced by marks, and compare.

One such skeleton serves all dialogs with the same sequence of roles. Where a dialog doesn't fit its skeleton, because
the template looks into the contents (drops earlier reasoning, say), each kept message is exchanged for a mark on its
own and the two renderings are compared from both ends.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainers.data.dialog import Dialog, RowError
from trainers.data.template import ChatTemplate, Turn

Span = tuple[int, int]
"""Characters [start, end)."""

# Unicode's noncharacters: "never used in interchange", left alone by every filter that templates use.
_MARK = "\ufdd0{}\ufdd1"
_MARKS = re.compile("\ufdd0(\\d+)\ufdd1")
_MAX_SKELETONS = 256
_MAX_TRIES = 3
_LEAD = 64  # characters


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """A template's own text around the contents: literals[0], content of fields[0], literals[1], ..., literals[-1].

    `fields` are message indices; `ends` maps a role to the text that ends its turn ("" where nothing does).
    """

    literals: list[str]
    fields: list[int]
    ends: dict[str, str]


class SpanFinder:
    """Finds trained characters. `control` matches every control token that the tokenizer knows."""

    def __init__(self, template: ChatTemplate, control: re.Pattern[str]) -> None:
        self._template = template
        self._control = control
        self._turn_end = re.compile(rf"\s*(?:{control.pattern})")
        self._skeletons: dict[str, _Skeleton | None] = {}

    def render(self, dialog: Dialog) -> tuple[str, list[Span]]:
        """The text of `dialog` and its trained characters, in the order of the messages.

        Raises RowError where the template refuses the dialog, leaves out a message, tools or tool calls, or rewrites a
        kept message beyond recognition.
        """
        text = self._template.render(dialog.messages, dialog.tools)
        skeleton = self._skeleton_of(dialog)
        fields = (skeleton and self._align(text, skeleton, dialog.messages)) or {}
        ends = skeleton.ends if skeleton else self._turn_ends(dialog)
        spans = []
        for i, (message, keep) in enumerate(zip(dialog.messages, dialog.keep_loss, strict=True)):
            if not keep and "tool_calls" not in message:
                continue
            start, end = fields.get(i) or self._differ(text, dialog, i)
            _check_calls(text[start:end], message)
            if keep:
                turn_end = ends[message["role"]]
                spans.append((start, end + len(turn_end) if text.startswith(turn_end, end) else end))
        return text, spans

    def turn_end(self, dialog: Dialog, role: str) -> str:
        """The text that ends a turn of `role` in `dialog`; "" where there is none."""
        return self._turn_ends(dialog)[role]

    def _skeleton_of(self, dialog: Dialog) -> _Skeleton | None:
        """None: the template refuses the marked dialog, or shows a message twice."""
        marked = _mark_all(dialog)
        simple = not dialog.tools and all(len(message) == 2 for message in marked)
        key = str([(m["role"], m["content"] == "") for m in marked]) if simple else json.dumps([marked, dialog.tools])
        if key not in self._skeletons:
            if len(self._skeletons) >= _MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = self._make_skeleton(dialog, marked)
        return self._skeletons[key]

    def _make_skeleton(self, dialog: Dialog, marked: list[Turn]) -> _Skeleton | None:
        try:
            text = self._template.render(marked, dialog.tools)
        except RowError:
            return None
        if not all(tool["function"]["name"] in text for tool in dialog.tools):
            raise RowError("the row has tools, and this model's chat template has no place for tools")
        parts = _MARKS.split(text)
        literals, fields = parts[::2], [int(index) for index in parts[1::2]]
        for i, message in enumerate(marked):
            if message["content"] and i not in fields:
                raise _left_out(i, message)
        if len(set(fields)) < len(fields):
            return None
        return _Skeleton(literals, fields, self._turn_ends(dialog))

    def _turn_ends(self, dialog: Dialog) -> dict[str, str]:
        """What ends a turn of each role: blanks and one control token right behind a last message of that role."""
        ends = {}
        for role in {message["role"] for message in dialog.messages}:
            places = (i for i, message in enumerate(dialog.messages) if message["role"] == role)
            ends[role] = next(self._ends_at(dialog, places), "")
        return ends

    def _ends_at(self, dialog: Dialog, places: Iterator[int]) -> Iterator[str]:
        for _, i in zip(range(_MAX_TRIES), places, strict=False):
            try:
                text = self._template.render([*dialog.messages[:i], _marked(dialog.messages[i], i)], dialog.tools)
            except RowError:  # not every beginning of a dialog is one that the template takes
                continue
            match = self._turn_end.match(text.rpartition(_MARK.format(i))[2])
            yield match.group() if match else ""

    def _align(self, text: str, skeleton: _Skeleton, messages: Sequence[Turn]) -> dict[int, Span] | None:
        """Where each content lies in `text`; None: `text` isn't the skeleton with the contents filled in."""
        position = len(skeleton.literals[0])
        if not text.startswith(skeleton.literals[0]):
            return None
        spans = {}
        for i, literal in zip(skeleton.fields, skeleton.literals[1:], strict=True):
            last = i == skeleton.fields[-1]
            end = self._field_end(text, position, messages[i], literal, last)
            if end is None:
                return None
            spans[i] = (position, end)
            position = end + len(literal)
        return spans

    def _field_end(self, text: str, start: int, message: Turn, literal: str, last: bool) -> int | None:
        """End of the content that starts at `start` and is followed by `literal`, to the end of `text` if `last`."""
        if "tool_calls" in message:
            # Their rendering is the template's secret, but it can't hold the control token that ends it.
            if not self._control.search(literal):
                return None
            end = len(text) - len(literal) if last else text.find(literal, start)
            return end if end >= start and text.startswith(literal, end) else None
        for content in _variants(message["content"]):
            end = start + len(content)
            if text.startswith(content, start) and (text[end:] == literal if last else text.startswith(literal, end)):
                return end
        return None

    def _differ(self, text: str, dialog: Dialog, i: int) -> Span:
        """Where message `i` lies in `text`, found by exchanging that message for a mark."""
        messages = dialog.messages
        mark = _marked(messages[i], i)
        try:
            other = self._template.render([*messages[:i], mark, *messages[i + 1 :]], dialog.tools)
            own = text
        except RowError:  # later messages may need this one as it was: leave them out
            other = self._template.render([*messages[:i], mark], dialog.tools)
            own = self._template.render(messages[: i + 1], dialog.tools)
        if _MARK.format(i) not in other:
            raise _left_out(i, messages[i])
        start = _common_prefix(own, other)
        end = len(own) - _common_prefix(own[start:][::-1], other[start:][::-1])
        span = self._grow(own, start, end, messages[i])
        if span is None or not text.startswith(own[: span[1]]):
            raise RowError(
                f"this model's chat template rewrites message {i} ({messages[i]['role']}): "
                "what to train on can't be told"
            )
        return span

    def _grow(self, text: str, start: int, end: int, message: Turn) -> Span | None:
        """The whole of what `message` became, given that [start, end) of it differs from a mark."""
        if "tool_calls" in message:
            around = self._control.finditer(text, max(0, end - _LEAD), end + _LEAD)
            return start, next((match.end() for match in around if match.start() < end < match.end()), end)
        for content in _variants(message["content"]):
            found = text.find(content, max(0, end - len(content)), start + len(content))
            if found >= 0:
                return found, found + len(content)
        squeezed = "".join(message["content"].split())
        if start == end or "".join(text[start:end].split()) not in squeezed:
            return None
        # The template kept a part, or changed blanks; a mark may share the first characters with it.
        for _ in range(min(start, _LEAD)):
            if "".join(text[start - 1 : end].split()) not in squeezed:
                break
            start -= 1
        return start, end


def _mark_all(dialog: Dialog) -> list[Turn]:
    return [
        _marked(message, i) if message["content"] or "tool_calls" in message else message
        for i, message in enumerate(dialog.messages)
    ]


def _marked(message: Turn, i: int) -> Turn:
    """`message` with a mark for all that its speaker wrote."""
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": _MARK.format(i)}


def _variants(content: str) -> Iterator[str]:
    """What templates are known to make of a content."""
    yield content
    yield content.strip()
    yield content.rstrip()
    yield content.lstrip()
    yield json.dumps(content, ensure_ascii=False)[1:-1]


def _check_calls(written: str, message: Turn) -> None:
    rest = written.replace(message["content"], "", 1)
    if not all(call["function"]["name"] in rest for call in message.get("tool_calls", ())):
        raise RowError("the row has tool calls, and this model's chat template has no place for tool calls")


def _left_out(i: int, message: Turn) -> RowError:
    return RowError(f"this model's chat template leaves out message {i} ({message['role']})")


def _common_prefix(a: str, b: str) -> int:
    """Length of the longest common beginning, by bisection: comparing slices is much faster than looping."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

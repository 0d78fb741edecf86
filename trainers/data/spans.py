"""Finds the characters of a rendered dialog that are trained on.

The trained text of a kept message (one with keep_loss) is what its speaker wrote (content and tool calls) and the token
that ends the turn; never the header before it, nor the line break after it. Text between the generation prompt and an
assistant's words is trained, too, as the model has to write it: a blank, or the empty thought of Qwen 3. Templates
don't tell where all this is. So the dialog is rendered again with marks in place of the contents, and the two
renderings are compared.

One such rendering (a skeleton) serves all dialogs with the same sequence of roles. If a dialog doesn't fit its
skeleton, because the template looks into the contents (and drops earlier reasoning, for example), each kept message is
replaced by a mark separately, and the two renderings are compared from both ends.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trainers.data.dialog import Dialog, RowError
from trainers.data.template import ChatTemplate, Turn

Span = tuple[int, int]
"""Characters [start, end)."""

# Noncharacters of Unicode, which texts don't contain; the filters that templates use leave them unchanged.
_MARK = "\ufdd0{}\ufdd1"
_MARKS = re.compile("\ufdd0(\\d+)\ufdd1")
_MAX_SKELETONS = 256
_MAX_TRIES = 8
_LEAD = 64  # characters
_NO_SYSTEM = "put the system message's text into the first user message"


class Traced(NamedTuple):
    """A rendered dialog: its text, and its trained characters in the order of the messages. `partly_shown`: the
    template shows only a part of a kept message. `unprompted`: a kept answer doesn't continue the generation prompt
    (some prompts begin the answer with `<think>`)."""

    text: str
    trained: list[Span]
    partly_shown: bool
    unprompted: bool


class _Frame(NamedTuple):
    """The template's text around the messages of a role. `lead` and `end` are trained: what the speaker has to write
    before its words, and what ends the turn. `cue`: what the generation prompt adds to the dialog before an answer."""

    lead: str = ""
    end: str = ""
    cue: str = ""


class _Skeleton(NamedTuple):
    """A template's text around the contents: literals[0], content of message fields[0], literals[1], ..., literals[-1].
    `frames` are by role."""

    literals: list[str]
    fields: list[int]
    frames: dict[str, _Frame]


class SpanFinder:
    """Finds trained characters. `control` matches every control token of the tokenizer, except those that an
    assistant's words may contain."""

    def __init__(self, template: ChatTemplate, control: re.Pattern[str]) -> None:
        self._template = template
        self._control = control
        self._turn_end = re.compile(rf"\s*(?:{control.pattern})")
        self._skeletons: dict[object, _Skeleton | None] = {}

    def render(self, dialog: Dialog) -> Traced:
        """The text of `dialog`, and its trained characters.

        Raises RowError if the template refuses the dialog; leaves out a message, tools or tool calls; or changes a kept
        message so much that it can't be found.
        """
        text = self._render_whole(dialog)
        skeleton = self._skeleton_of(dialog)
        fields = (skeleton and self._align(text, skeleton, dialog.messages)) or {}
        frames = skeleton.frames if skeleton else self._frames(dialog.messages, dialog.tools)
        spans, partly, unprompted = [], False, False
        for i, (message, keep) in enumerate(zip(dialog.messages, dialog.keep_loss, strict=True)):
            frame = frames[message["role"]]
            if "tool_calls" in message:
                start, end = fields.get(i) or self._find_calls(text, dialog, i, frame)
                self._check_calls(text[start:end], dialog, i)
            elif keep:
                start, end = fields.get(i) or self._find_answer(text, dialog, i, frame)
            if keep:
                spans.append(_framed(text, start, end, frame))
                # The part of a message that the generation prompt has already counts as shown.
                partly = partly or not (
                    _shows(text[start:end], message["content"])
                    or _shows(text[max(0, start - len(frame.cue)) : end], message["content"])
                )
                unprompted = unprompted or not self._is_prompted(text, spans[-1], dialog, i, frame)
        return Traced(text, spans, partly, unprompted)

    def turn_end(self, dialog: Dialog, role: str) -> str:
        """The text that ends a turn of `role` in `dialog`; "" if there is none."""
        return self._frame(role, dialog.messages, dialog.tools).end

    def _render_whole(self, dialog: Dialog) -> str:
        try:
            return self._template.render(dialog.messages, dialog.tools)
        except RowError as error:
            if dialog.messages[0]["role"] != "system" or not self._takes(dialog.messages[1:], dialog.tools):
                raise
            raise RowError(f"{error}: {_NO_SYSTEM}") from None

    def _takes(self, messages: Sequence[Turn], tools: Sequence[Turn]) -> bool:
        try:
            self._template.render(messages, tools)
        except RowError:
            return False
        return True

    def cue(self, before: Sequence[Turn], tools: Sequence[Turn] = ()) -> str:
        """What the generation prompt adds to `before`; "" if the template has no such prompt, or refuses it."""
        prompt = self._prompt(before, tools)
        if prompt is None:
            return ""
        try:
            shown = self._template.render(before, tools)
        except RowError:
            return ""
        return prompt[_common_prefix(prompt, shown) :]

    def _is_prompted(self, text: str, span: Span, dialog: Dialog, i: int, frame: _Frame) -> bool:
        """Whether the kept message `i`, trained as `span` of `text`, continues the generation prompt."""
        if _follows(text, span[0], frame.cue):
            return True
        # The prompt may be another one here than at the message that the frame comes from: after a tool's result, say.
        return _follows(text, span[0], self.cue(dialog.messages[:i], dialog.tools))

    def _skeleton_of(self, dialog: Dialog) -> _Skeleton | None:
        """The skeleton for `dialog`; None if the template refuses the marked dialog, or shows a message twice."""
        key: object
        if not dialog.tools and all(len(message) == 2 for message in dialog.messages):  # role and content
            key = tuple((message["role"], message["content"] == "") for message in dialog.messages)
        else:
            key = json.dumps([_mark_all(dialog), dialog.tools])
        if key not in self._skeletons:
            if len(self._skeletons) >= _MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = self._make_skeleton(dialog, _mark_all(dialog))
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
        # The frames are made of the marked dialog, not of this dialog's contents: other dialogs will use them, too.
        return _Skeleton(literals, fields, self._frames(marked, dialog.tools))

    def _frames(self, messages: Sequence[Turn], tools: Sequence[Turn]) -> dict[str, _Frame]:
        return {role: self._frame(role, messages, tools) for role in {message["role"] for message in messages}}

    def _frame(self, role: str, messages: Sequence[Turn], tools: Sequence[Turn]) -> _Frame:
        """The frame of the messages of `role`, found by rendering one of them as the last message of a dialog."""
        places = [i for i, message in enumerate(messages) if message["role"] == role]
        if role == "assistant":
            places.reverse()  # some templates write a lead only before the last answer, after a user's message
        seen: _Frame | None = None
        for i in places[:_MAX_TRIES]:
            before = messages[:i]
            try:
                text = self._template.render([*before, _marked(messages[i], i)], tools)
            except RowError:
                continue
            head, _, tail = text.rpartition(_MARK.format(i))
            match = self._turn_end.match(tail)
            end = match.group() if match else ""
            if role != "assistant":
                return _Frame(end=end)
            seen = seen or _Frame("", end, self.cue(before, tools))
            # If the text doesn't begin with the prompt, the prompt may show the previous answer as the last one does.
            prompt = self._prompt(before, tools)
            if prompt is not None and head.startswith(prompt):
                lead = head[len(prompt) :]
                # If the template has no generation prompt, this includes the header.
                return seen._replace(lead=lead if seen.cue or lead.isspace() else "")
        return seen or _Frame()

    def _prompt(self, before: Sequence[Turn], tools: Sequence[Turn]) -> str | None:
        """The generation prompt for an answer to `before`; None if the template refuses that."""
        try:
            return self._template.render(before, tools, add_generation_prompt=True)
        except RowError:
            return None

    def _align(self, text: str, skeleton: _Skeleton, messages: Sequence[Turn]) -> dict[int, Span] | None:
        """Where each content is in `text`; None if `text` isn't the skeleton with the contents filled in."""
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
        """The end of the content that starts at `start` and is followed by `literal` (if `last`, up to the end of
        `text`); None if it isn't there."""
        if "tool_calls" in message:
            # Nobody knows how the template renders them, but the rendering can't contain the control token after it.
            if not self._control.search(literal):
                return None
            end = len(text) - len(literal) if last else text.find(literal, start)
            return end if end >= start and text.startswith(literal, end) else None
        for content in _variants(message["content"]):
            end = start + len(content)
            if text.startswith(content, start) and (text[end:] == literal if last else text.startswith(literal, end)):
                return end
        return None

    def _find_answer(self, text: str, dialog: Dialog, i: int, frame: _Frame) -> Span:
        """As `_find_content`, but from the end of the generation prompt if the cue isn't before the content: the
        template may put something else before these words than before a mark, such as a `<think>` that they lack."""
        start, end = self._find_content(text, dialog, i)
        if not frame.cue or text.endswith((frame.cue, frame.cue + frame.lead), 0, start):
            return start, end
        prompt = self._prompt(dialog.messages[:i], dialog.tools)
        return len(prompt) if prompt is not None and text.startswith(prompt, 0, start) else start, end

    def _find_content(self, text: str, dialog: Dialog, i: int) -> Span:
        """Where message `i` is in `text`, found by replacing it by a mark."""
        message, mark = dialog.messages[i], _MARK.format(i)
        other = self._template.render(_exchanged(dialog.messages, i, i + 1), dialog.tools)
        if mark not in other:
            raise _left_out(i, message)
        start = _common_prefix(text, other)
        end = len(text) - _common_prefix(text[start:][::-1], other[start:][::-1])
        for content in _variants(message["content"]):
            found = text.find(content, max(0, end - len(content)), start + len(content))
            if found >= 0:
                return found, found + len(content)
        squeezed = _squeezed(message["content"])
        if start == end or _squeezed(text[start:end]) not in squeezed:
            raise _rewritten(i, message)
        # The template kept only a part, or changed blanks. Text around a mark may begin like this part, which puts
        # `start` too late: extend it to the left while the text still is a part of the content. But text before the
        # words may end like the dropped part (`<|Assistant|>` like `</think>`): so not into the prompt, nor into a
        # control token.
        prompt = self._prompt(dialog.messages[:i], dialog.tools) or ""
        first = max(0, start - _LEAD, _common_prefix(text[:start], prompt))
        first = max(first, *(match.end() for match in self._control.finditer(text, first, start)), first)
        whole = start
        for begin in range(start - 1, first - 1, -1):
            if _squeezed(text[begin:end]) not in squeezed:
                break
            whole = whole if text[begin].isspace() else begin
        return whole, end

    def _find_calls(self, text: str, dialog: Dialog, i: int, frame: _Frame) -> Span:
        """Where message `i`, with its tool calls, is in `text`: from where a mark would be to the end of its turn."""
        message, mark = dialog.messages[i], _MARK.format(i)
        endings = [ending for ending in (frame.end, self._end_of_calls(dialog, i)) if ending]
        # The template may refuse the next messages after a plain message: leave out as few of them as necessary.
        for following in range(i + 1, min(i + _MAX_TRIES, len(dialog.messages)) + 1):
            try:
                other = self._template.render(_exchanged(dialog.messages, i, following), dialog.tools)
            except RowError:
                continue
            at = other.find(mark)
            # The text before a mark may begin like the message itself.
            lead = frame.lead if other.endswith(frame.lead, 0, at) else ""
            start = min(_common_prefix(text, other), at - len(lead))
            found = [(end, ending) for ending in endings if (end := text.find(ending, start)) >= 0]
            if found and at >= 0 and other[start:at].removeprefix(lead).strip() == "":
                end, ending = min(found)
                return start, end if ending == frame.end else end + len(ending)
        raise _rewritten(i, message)

    def _end_of_calls(self, dialog: Dialog, i: int) -> str:
        """The control token after message `i`, with its tool calls, if it is the last message. It may differ from that
        of a plain message, or end the whole dialog. "" if there is none, or the template refuses that."""
        try:
            shown = self._template.render(dialog.messages[: i + 1], dialog.tools).rstrip()
        except RowError:
            return ""
        return next((match.group() for match in self._control.finditer(shown) if match.end() == len(shown)), "")

    def _check_calls(self, written: str, dialog: Dialog, i: int) -> None:
        """Raises RowError if the template leaves out the tool calls of message `i`, or the text beside them."""
        message = dialog.messages[i]
        rest = written.replace(message["content"], "", 1)
        if not all(call["function"]["name"] in rest for call in message["tool_calls"]):
            raise RowError("the row has tool calls, and this model's chat template has no place for tool calls")
        if _shows(written, message["content"]):
            return
        # The template may only have dropped reasoning from the text: then it shows a mark.
        mark = _MARK.format(i)
        marked = [*dialog.messages[:i], {**message, "content": mark}, *dialog.messages[i + 1 :]]
        if mark not in self._template.render(marked, dialog.tools):
            raise RowError(
                f"this model's chat template leaves out the text beside the tool calls of message {i} "
                f"({message['role']}): leave its content empty"
            )


def _framed(text: str, start: int, end: int, frame: _Frame) -> Span:
    if frame.lead and text.endswith(frame.lead, 0, start):
        start -= len(frame.lead)
    return start, end + len(frame.end) if text.startswith(frame.end, end) else end


def _follows(text: str, start: int, cue: str) -> bool:
    """Whether `cue`, without blanks around it, is before `start`, or overlaps it: an answer may contain its end."""
    return text.find(cue.strip(), max(0, start - len(cue)), start + len(cue)) >= 0


def _exchanged(messages: Sequence[Turn], i: int, following: int) -> list[Turn]:
    """`messages` with a mark for message `i`, followed only by those from `following` on."""
    return [*messages[:i], _marked(messages[i], i), *messages[following:]]


def _mark_all(dialog: Dialog) -> list[Turn]:
    return [
        _marked(message, i) if message["content"] or "tool_calls" in message else message
        for i, message in enumerate(dialog.messages)
    ]


def _marked(message: Turn, i: int) -> Turn:
    """`message` with a mark instead of its content and tool calls."""
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": _MARK.format(i)}


def _variants(content: str) -> Iterator[str]:
    """The forms of a content that templates are known to print."""
    yield content
    yield content.strip()
    yield content.rstrip()
    yield content.lstrip()
    yield json.dumps(content, ensure_ascii=False)[1:-1]


def _shows(written: str, content: str) -> bool:
    """Whether `written` contains all of `content`, up to changes in blanks."""
    return any(variant in written for variant in _variants(content)) or _squeezed(content) in _squeezed(written)


def _squeezed(text: str) -> str:
    """`text` without its blanks."""
    return "".join(text.split())


def _left_out(i: int, message: Turn) -> RowError:
    remedy = f": {_NO_SYSTEM}" if message["role"] == "system" else ""
    return RowError(f"this model's chat template leaves out message {i} ({message['role']}){remedy}")


def _rewritten(i: int, message: Turn) -> RowError:
    return RowError(
        f"this model's chat template rewrites message {i} ({message['role']}): what to train on can't be determined"
    )


def _common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix, by bisection: comparing slices is much faster than looping."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

"""One row of training data: its wire format, and the dialog made of it.

`TrainingDataItem` is the row as the API documents it; `PreferenceDataItem` is that of a job that trains on preferences.
A `Dialog` is a row in normal form: messages as chat templates take them, and which of them are trained on.
`trainers.data.rows` turns rows into dialogs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError, from_json

MAX_ROW_BYTES = 1 << 20
"""Longest line that is read as a row, in bytes: about a quarter of a million tokens. It bounds the memory that
validation takes: the tokenizers library needs about 136 bytes for each byte of a text."""

_SHOWN = 60  # characters of a bad value that an error may repeat


class RowError(ValueError):
    """A row can't be trained on. The message is one sentence without a line number, and never repeats the whole row."""


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Wire):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


def _check_arguments(value: object) -> object:
    if value is None or value == "":
        return {}  # some servers write a call without arguments like this
    if not isinstance(value, str | dict):
        raise PydanticCustomError("bad_arguments", "must be a JSON object, or one written as a string")
    return value


class FunctionCall(_Wire):
    """The function called, and with what."""

    name: str = Field(min_length=1)
    arguments: Annotated[str | dict[str, Any], BeforeValidator(_check_arguments)] = Field(
        description="A JSON object, as text (as OpenAI has it) or as it is; none where it is null or empty."
    )


class ToolCall(_Wire):
    """A call the assistant makes."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionDefinition(BaseModel):
    """A function the assistant may call; keys beyond these reach the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = Field(min_length=1)
    description: str | SkipJsonSchema[None] = None
    parameters: dict[str, Any] | SkipJsonSchema[None] = None


class Tool(_Wire):
    """A function shown to the model."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


def _check_content(value: object) -> object:
    """Checks a content before pydantic checks the union, which would report one error per member."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("bad_content", "must be a string, a list of text parts, or null")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise PydanticCustomError(
                "bad_part", "holds a part of type {kind}, and only text is taken", {"kind": short(kind)}
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("bad_part", "holds a text part whose text is not a string")
        if unknown := sorted(part.keys() - {"type", "text"}):
            raise PydanticCustomError(
                "bad_part", "holds a text part with the unknown key {key}", {"key": short(unknown[0])}
            )
    return value


class Message(_Wire):
    """One turn of a dialog, in step with /chat_completion."""

    role: Literal["system", "user", "assistant", "tool", "ipython"] = Field(
        description="Who speaks. `ipython` is an alias of `tool`."
    )
    content: Annotated[str | list[TextPart] | None, BeforeValidator(_check_content)] = Field(
        default=None, description="Text, or a list of text parts. May be null only if there are tool_calls."
    )
    tool_calls: list[ToolCall] | None = Field(
        default=None, min_length=1, description="Only in an assistant message: the calls it makes."
    )
    tool_call_id: str | None = Field(
        default=None, description="Only in a tool message: the call that this is the result of."
    )
    name: str | None = Field(default=None, description="Name of the speaker or the tool, for templates that show it.")

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.tool_calls is not None and self.role != "assistant":
            raise PydanticCustomError("bad_message", "has tool_calls, which only an assistant message may have")
        if self.tool_call_id is not None and self.role not in ("tool", "ipython"):
            raise PydanticCustomError("bad_message", "has a tool_call_id, which only a tool message may have")
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("bad_message", "has neither content nor tool_calls")
        return self

    @property
    def text(self) -> str:
        """The content as one string; empty where it is null."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class TrainingDataItem(_Wire):
    """One row of a data file, on one line: a whole dialog, and which of its messages are trained on."""

    dialog: list[Message] = Field(description="The whole context, in order. A system message must come first.")
    keep_loss: list[bool] | None = Field(
        default=None,
        description="keep_loss[i] says whether message i is trained on: its content and its end-of-turn token. As many "
        "as there are messages, not all false. Default: the assistant messages.",
    )
    tools: list[Tool] | None = Field(default=None, description="Functions shown to the model, in OpenAI's format.")

    @model_validator(mode="after")
    def _can_be_trained_on(self) -> Self:
        if not self.dialog:
            raise PydanticCustomError("bad_dialog", "the dialog is empty")
        _check_order(self.dialog)
        if self.keep_loss is not None and len(self.keep_loss) != len(self.dialog):
            raise PydanticCustomError(
                "bad_mask",
                "keep_loss has {mask} entries for {messages} messages",
                {"mask": len(self.keep_loss), "messages": len(self.dialog)},
            )
        if not any(self.mask):
            no_assistant, all_false = "there is no assistant message", "keep_loss is false for every message"
            reason = no_assistant if self.keep_loss is None else all_false
            raise PydanticCustomError("bad_mask", "nothing to train on: {reason}", {"reason": reason})
        return self

    @property
    def mask(self) -> tuple[bool, ...]:
        """Which messages are trained on: `keep_loss`, or the default."""
        if self.keep_loss is not None:
            return tuple(self.keep_loss)
        return tuple(message.role == "assistant" for message in self.dialog)


def _check_order(messages: Sequence[Message]) -> None:
    called = False
    ids: set[str] = set()
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise PydanticCustomError("bad_order", "the system message at {i} is not the first message", {"i": i})
        if message.tool_calls:
            called = True
            ids.update(call.id for call in message.tool_calls if call.id is not None)
        elif message.role in ("tool", "ipython"):
            if not called:
                raise PydanticCustomError("bad_order", "the tool result at {i} has no tool call before it", {"i": i})
            if ids and message.tool_call_id is not None and message.tool_call_id not in ids:
                raise PydanticCustomError(
                    "bad_order", "the tool_call_id of the tool result at {i} names no call before it", {"i": i}
                )


def _listed(value: object) -> object:
    """A single message stands for a list of one."""
    return [value] if isinstance(value, dict) else value


class PreferenceDataItem(_Wire):
    """One row of a data file for DPO: two ways a dialog may go on, and which is the better one.

    With `dialog`, `chosen` and `rejected` are what follows it; without, each is a whole dialog, and they begin alike.
    What is trained are the assistant messages after what they share.
    """

    dialog: list[Message] | SkipJsonSchema[None] = Field(
        default=None, description="The dialog that both answers continue, in order."
    )
    chosen: Annotated[list[Message], BeforeValidator(_listed)] = Field(description="The better answer.")
    rejected: Annotated[list[Message], BeforeValidator(_listed)] = Field(description="The worse answer.")
    tools: list[Tool] | SkipJsonSchema[None] = Field(
        default=None, description="Functions shown to the model, in OpenAI's format."
    )

    @property
    def dialogs(self) -> tuple[list[Message], list[Message]]:
        """The whole dialogs, chosen and rejected."""
        context = self.dialog or []
        return [*context, *self.chosen], [*context, *self.rejected]

    @property
    def shared(self) -> int:
        """The number of messages at the beginning that the two dialogs have in common."""
        return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*self.dialogs, strict=False)))


@dataclass(frozen=True, slots=True)
class Dialog:
    """A row in normal form. `keep_loss` is as long as `messages`, and not all false.

    `messages` are dicts as chat templates take them: `role` (system, user, assistant, tool), `content` (a string; empty
    if there are only tool calls), and if the row has them `tool_calls` (arguments as objects), `tool_call_id`, `name`.
    """

    messages: tuple[dict[str, Any], ...]
    keep_loss: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] = ()


class Pair(NamedTuple):
    """A row of preferences in normal form. On both sides, the assistant messages after the shared beginning are
    trained."""

    chosen: Dialog
    rejected: Dialog


def check_order(messages: Sequence[Message]) -> None:
    """Raises RowError if a system message isn't the first, or a tool result doesn't follow a matching tool call."""
    try:
        _check_order(messages)
    except PydanticCustomError as error:
        raise RowError(error.message()) from None


def for_template(messages: Sequence[Message], where: str) -> tuple[dict[str, Any], ...]:
    """The messages as chat templates take them (`Dialog.messages`). `where`: the user's name for the list, for errors.
    Raises RowError if the arguments of a tool call aren't a JSON object."""
    return tuple(_for_template(message, f"{where}[{i}]") for i, message in enumerate(messages))


def normalised(
    messages: Sequence[Message], keep: tuple[bool, ...], tools: Sequence[Tool] | None, where: Callable[[int], str]
) -> Dialog:
    """The dialog of a row. `where` gives the row's name of message i, for errors. Raises RowError as `for_template`."""
    turns = tuple(_for_template(message, where(i)) for i, message in enumerate(messages))
    return Dialog(
        turns, keep, tuple(tool.model_dump(exclude_unset=True) | {"type": "function"} for tool in tools or ())
    )


def _for_template(message: Message, where: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "tool" if message.role == "ipython" else message.role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [_call_for_template(call, where) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _call_for_template(call: ToolCall, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object (in OpenAI's format they are text), as templates print them as JSON
    themselves."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments, allow_inf_nan=False)
        except ValueError as error:
            raise RowError(f"the arguments of a tool call of {where} are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise RowError(f"the arguments of a tool call of {where} are not a JSON object but {json_type(arguments)}")
    turn = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return turn if call.id is None else {"id": call.id} | turn


def short(value: object) -> str:
    """A bad value, shortened for an error message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def json_type(value: object) -> str:
    """The JSON type of `value`, with its article."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")

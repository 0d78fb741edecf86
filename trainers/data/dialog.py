"""One row of training data: its wire format, and the dialog it means.

`TrainingDataItem` is the row as the API documents it. `parse_row` reads one line of a data file in that format, or in
OpenAI's (`{"messages": [... "weight": 0 or 1]}`), into a `Dialog`: messages as chat templates take them, and which of
them are trained on. A row that can't be trained on is a `RowError` that says why in one sentence.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

MAX_ROW_BYTES = 1 << 20
"""Longest line that is read as a row, in bytes: about a quarter of a million tokens. The tokenizers library takes some
136 bytes of memory for each byte of a text, so this is what bounds the memory of validation."""

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
    if not isinstance(value, str | dict):
        raise PydanticCustomError("bad_arguments", "must be a JSON object, or one written as a string")
    return value


class FunctionCall(_Wire):
    """The function called, and with what."""

    name: str = Field(min_length=1)
    arguments: Annotated[str | dict[str, Any], BeforeValidator(_check_arguments)] = Field(
        description="A JSON object, as text (as OpenAI has it) or as it is."
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
    """Says what is wrong with a content before the union would say it twice."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("bad_content", "must be a string, a list of text parts, or null")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise PydanticCustomError(
                "bad_part", "holds a part of type {kind}, and only text can be trained on", {"kind": _short(kind)}
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("bad_part", "holds a text part whose text is not a string")
        if unknown := sorted(part.keys() - {"type", "text"}):
            raise PydanticCustomError(
                "bad_part", "holds a text part with the unknown key {key}", {"key": _short(unknown[0])}
            )
    return value


class Message(_Wire):
    """One turn of a dialog, in step with /chat_completion."""

    role: Literal["system", "user", "assistant", "tool", "ipython"] = Field(
        description="Who speaks. `ipython` is an alias of `tool`."
    )
    content: Annotated[str | list[TextPart] | None, BeforeValidator(_check_content)] = Field(
        default=None, description="Text, or a list of text parts. May be null only where there are tool_calls."
    )
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1, description="Assistant messages only.")
    tool_call_id: str | None = Field(default=None, description="Tool messages only: the call this is the result of.")
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

    dialog: list[Message] = Field(description="The whole context, in order. A system message may only be the first.")
    keep_loss: list[bool] | None = Field(
        default=None,
        description="keep_loss[i] says whether message i is trained on: its content and its end-of-turn token. As long "
        "as `dialog`, not all false. Default: the assistant messages.",
    )
    tools: list[Tool] | None = Field(default=None, description="Functions shown to the model, in OpenAI's format.")

    @model_validator(mode="after")
    def _can_be_trained_on(self) -> Self:
        if not self.dialog:
            raise PydanticCustomError("bad_dialog", "the dialog is empty")
        self._check_order()
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

    def _check_order(self) -> None:
        called = False
        ids: set[str] = set()
        for i, message in enumerate(self.dialog):
            if message.role == "system" and i > 0:
                raise PydanticCustomError("bad_order", "the system message at {i} is not the first message", {"i": i})
            if message.tool_calls:
                called = True
                ids.update(call.id for call in message.tool_calls if call.id is not None)
            elif message.role in ("tool", "ipython"):
                if not called:
                    raise PydanticCustomError(
                        "bad_order", "the tool result at {i} has no tool call before it", {"i": i}
                    )
                if ids and message.tool_call_id is not None and message.tool_call_id not in ids:
                    raise PydanticCustomError(
                        "bad_order", "the tool_call_id of the tool result at {i} names no call before it", {"i": i}
                    )

    @property
    def mask(self) -> tuple[bool, ...]:
        """Which messages are trained on, the default filled in."""
        if self.keep_loss is not None:
            return tuple(self.keep_loss)
        return tuple(message.role == "assistant" for message in self.dialog)


@dataclass(frozen=True, slots=True)
class Dialog:
    """A row, normalised. `keep_loss` is as long as `messages` and not all false.

    `messages` are dicts as chat templates take them: `role` (system, user, assistant, tool), `content` (a string, empty
    beside mere tool calls), and where the row has them `tool_calls` (arguments as objects), `tool_call_id`, `name`.
    """

    messages: tuple[dict[str, Any], ...]
    keep_loss: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] = ()


def parse_row(raw: bytes) -> Dialog:
    """Reads one line. Raises RowError for anything that can't be trained on."""
    if len(raw) > MAX_ROW_BYTES:
        raise RowError(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB")
    row = _read_object(raw)
    field = "dialog"
    if "messages" in row:
        field, row = "messages", _from_openai(row)
    try:
        item = TrainingDataItem.model_validate(row)
    except ValidationError as error:
        raise RowError(_sentence(error.errors(include_url=False)[0], field)) from None
    messages = tuple(_for_template(message, f"{field}[{i}]") for i, message in enumerate(item.dialog))
    tools = tuple(tool.model_dump(exclude_unset=True) | {"type": "function"} for tool in item.tools or ())
    return Dialog(messages, item.mask, tools)


def _read_object(raw: bytes) -> dict[str, Any]:
    try:
        row = from_json(raw, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        try:
            raw.decode()
        except UnicodeDecodeError:
            raise RowError("the line is not UTF-8 text") from None
        raise RowError(f"the line is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"the line is not a JSON object but {_json_type(row)}")
    return row


def _from_openai(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `messages` with weights as one of `dialog` with keep_loss. All but the weights is checked later."""
    clash = row.keys() & {"dialog", "keep_loss"}
    if clash:
        raise RowError(f"the row has both 'messages' and '{min(clash)}': use one of the two formats")
    messages = row["messages"]
    if not isinstance(messages, list):
        raise RowError(f"messages must be a list, not {_json_type(messages)}")
    dialog, keep = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(f"messages[{i}] must be an object, not {_json_type(message)}")
        is_assistant = message.get("role") == "assistant"
        weight = message.get("weight")
        if weight is not None:
            if not is_assistant:
                raise RowError(f"messages[{i}] has a weight, which only an assistant message may have")
            if weight not in (0, 1):
                raise RowError(f"messages[{i}].weight must be 0 or 1, not {_short(weight)}")
        keep.append(is_assistant and weight != 0)
        dialog.append({key: value for key, value in message.items() if key != "weight"})
    if any(keep) != any(message.get("role") == "assistant" for message in dialog):
        raise RowError("nothing to train on: the weight of every assistant message is 0")
    rest = {key: value for key, value in row.items() if key != "messages"}
    return rest | {"dialog": dialog, "keep_loss": keep if any(keep) else None}


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
    """Templates print arguments as JSON themselves, so they take the object that OpenAI's format has as text."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments, allow_inf_nan=False)
        except ValueError as error:
            raise RowError(f"the arguments of a tool call of {where} are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise RowError(f"the arguments of a tool call of {where} are not a JSON object but {_json_type(arguments)}")
    turn = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return turn if call.id is None else {"id": call.id} | turn


_EXPECTED = {
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "string_type": "a string",
    "bool_type": "true or false",
}


def _sentence(error: ErrorDetails, field: str) -> str:
    """pydantic's first complaint in our words; `field` is what the row calls its list of messages."""
    path = _path(error["loc"], field)
    kind = error["type"]
    if kind == "extra_forbidden":
        parent, key = _path(error["loc"][:-1], field), _short(error["loc"][-1])
        return f"unknown key {key} in {parent}" if parent else f"unknown key {key}"
    if kind == "missing":
        return f"{path} is missing"
    if kind == "literal_error":
        return f"{path} must be {error['ctx']['expected']}, not {_short(error['input'])}"
    if kind.startswith("bad_"):
        return f"{path} {error['msg']}" if path else error["msg"]
    if expected := _EXPECTED.get(kind):
        return f"{path} must be {expected}"
    return f"{path}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _path(loc: tuple[int | str, ...], field: str) -> str:
    """`('dialog', 2, 'role')` -> `dialog[2].role`."""
    path = ""
    for step in (field if step == "dialog" and i == 0 else step for i, step in enumerate(loc)):
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")

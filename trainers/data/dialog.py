"""One row of training data: its wire format, and the dialog it means.

`TrainingDataItem` is the row as the API documents it. `parse_row` reads one line of a data file in that format, or in
OpenAI's (`{"messages": [... "weight": 0 or 1]}`), into a `Dialog`: messages as chat templates take them, and which of
them are trained on. `PreferenceDataItem` is the row of a job that trains on preferences; `parse_pair` reads one into
two dialogs. A row that can't be trained on is a `RowError` that says why in one sentence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any, Literal, NamedTuple, Self

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
        """Which messages are trained on, the default filled in."""
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
    Trained on are the assistant messages behind what they share.
    """

    dialog: list[Message] | SkipJsonSchema[None] = Field(default=None, description="What both continue, in order.")
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
        """How many messages the two have in common at their beginning."""
        return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*self.dialogs, strict=False)))


@dataclass(frozen=True, slots=True)
class Dialog:
    """A row, normalised. `keep_loss` is as long as `messages` and not all false.

    `messages` are dicts as chat templates take them: `role` (system, user, assistant, tool), `content` (a string, empty
    beside mere tool calls), and where the row has them `tool_calls` (arguments as objects), `tool_call_id`, `name`.
    """

    messages: tuple[dict[str, Any], ...]
    keep_loss: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] = ()


class Pair(NamedTuple):
    """A row of preferences, normalised. Both sides train their assistant messages behind the beginning they share."""

    chosen: Dialog
    rejected: Dialog


def parse_row(raw: bytes) -> Dialog:
    """Reads one line. Raises RowError for anything that can't be trained on."""
    row = _read_object(raw)
    if preferences := [key for key in _PREFERENCE_KEYS if key in row]:
        raise RowError(
            f"the row has '{preferences[0]}': it is one of preferences, which only DPO trains on (set extras.loss to "
            "torchtune.rlhf.loss.DPOLoss)"
        )
    field = "dialog"
    if "messages" in row:
        field, row = "messages", _from_openai(row)
    try:
        item = TrainingDataItem.model_validate(row)
    except ValidationError as error:
        raise RowError(_sentence(error.errors(include_url=False)[0], {"dialog": field})) from None
    return _normalised(item.dialog, item.mask, item.tools, lambda i: f"{field}[{i}]")


def check_order(messages: Sequence[Message]) -> None:
    """Raises RowError where messages follow one another as no dialog does."""
    try:
        _check_order(messages)
    except PydanticCustomError as error:
        raise RowError(error.message()) from None


def for_template(messages: Sequence[Message], where: str) -> tuple[dict[str, Any], ...]:
    """The messages as chat templates take them (`Dialog.messages`); `where` is what the user calls the list. Raises
    RowError for arguments of a tool call that are no JSON object."""
    return tuple(_for_template(message, f"{where}[{i}]") for i, message in enumerate(messages))


_PREFERENCE_KEYS = ("chosen", "rejected", "preferred_output", "non_preferred_output")


def parse_pair(raw: bytes) -> Pair:
    """Reads one line of preferences: as `PreferenceDataItem` has it (`messages` is another name of `dialog`), or as
    OpenAI has it: `{"input": {"messages", "tools"}, "preferred_output", "non_preferred_output"}`. Raises RowError for
    anything that can't be trained on."""
    row, names = _with_our_names(_read_object(raw))
    try:
        item = PreferenceDataItem.model_validate(row)
    except ValidationError as error:
        raise RowError(_sentence(error.errors(include_url=False)[0], names)) from None
    _check_pair(item, names)
    return Pair(*(_side(item, side, names) for side in ("chosen", "rejected")))


def _with_our_names(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The row with the keys of PreferenceDataItem, and what the row itself calls each of them."""
    if "keep_loss" in row:
        raise RowError("keep_loss has no place in a row of preferences: what the two dialogs don't share is trained on")
    names = {name: name for name in PreferenceDataItem.model_fields}
    if row.keys() & {"input", "preferred_output", "non_preferred_output"}:
        names |= {"chosen": "preferred_output", "rejected": "non_preferred_output"}
        names |= {"dialog": "input.messages", "tools": "input.tools"}
        given = row.get("input")
        if not isinstance(given, dict):
            raise RowError("input must be an object with messages" if "input" in row else "input is missing")
        if "messages" not in given:
            raise RowError("input.messages is missing")
        row = {key: value for key, value in row.items() if key != "input"} | {
            f"input.{key}": value
            for key, value in given.items()
            if key != "parallel_tool_calls"  # says how answers are to be sampled
        }
    elif "messages" in row:
        names["dialog"] = "messages"
    if not row.keys() & {names["chosen"], names["rejected"]}:
        raise RowError(
            "the row has no 'chosen' and 'rejected', which DPO trains on: for rows of one dialog leave extras.loss out"
        )
    for ours, theirs in names.items():
        if ours != theirs and ours in row:
            raise RowError(f"the row has both '{theirs}' and '{ours}': use one of the two formats")
    ours_of = {theirs: ours for ours, theirs in names.items()}
    return {ours_of.get(key, key): value for key, value in row.items()}, names


def _check_pair(item: PreferenceDataItem, names: Mapping[str, str]) -> None:
    chosen, rejected = names["chosen"], names["rejected"]
    for name, messages in ((chosen, item.chosen), (rejected, item.rejected)):
        if not messages:
            raise RowError(f"{name} is empty")
        if item.dialog is not None and messages[0].role != "assistant":
            raise RowError(
                f"{name} must begin with an assistant message: what it answers stands in {names['dialog']} already"
            )
    if item.dialog is not None and not item.dialog:
        raise RowError(f"{names['dialog']} is empty")
    if item.chosen == item.rejected:
        raise RowError(f"{chosen} and {rejected} are the same: there is nothing to prefer")
    if not item.shared:
        raise RowError(f"{chosen} and {rejected} don't begin with the same message: they must answer the same prompt")
    for name, messages in zip((chosen, rejected), item.dialogs, strict=True):
        rest = messages[item.shared :]
        if not rest or rest[0].role != "assistant":
            what = f"is {_article(rest[0].role)} message" if rest else "is missing"
            raise RowError(
                f"{chosen} and {rejected} must part with an assistant message: the first message of {name} that they "
                f"don't share {what}"
            )
        try:
            _check_order(messages)
        except PydanticCustomError as error:
            raise RowError(f"in the whole dialog of {name}, {error.message()}") from None


def _side(item: PreferenceDataItem, side: Literal["chosen", "rejected"], names: Mapping[str, str]) -> Dialog:
    messages = item.dialogs[0 if side == "chosen" else 1]
    before, shared = len(item.dialog or ()), item.shared
    keep = tuple(i >= shared and message.role == "assistant" for i, message in enumerate(messages))

    def where(i: int) -> str:
        return f"{names['dialog']}[{i}]" if i < before else f"{names[side]}[{i - before}]"

    return _normalised(messages, keep, item.tools, where)


def _article(role: str) -> str:
    return f"an {role}" if role == "ipython" else f"a {role}"


def _normalised(
    messages: Sequence[Message], keep: tuple[bool, ...], tools: Sequence[Tool] | None, where: Callable[[int], str]
) -> Dialog:
    turns = tuple(_for_template(message, where(i)) for i, message in enumerate(messages))
    return Dialog(
        turns, keep, tuple(tool.model_dump(exclude_unset=True) | {"type": "function"} for tool in tools or ())
    )


def _read_object(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_ROW_BYTES:
        raise RowError(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB")
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


def _sentence(error: ErrorDetails, names: Mapping[str, str]) -> str:
    """pydantic's first complaint in our words; `names` is what the row calls our fields."""
    path = _path(error["loc"], names)
    kind = error["type"]
    if kind == "extra_forbidden":
        parent, key = _path(error["loc"][:-1], names), _short(error["loc"][-1])
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


def _path(loc: tuple[int | str, ...], names: Mapping[str, str]) -> str:
    """`('dialog', 2, 'role')` -> `dialog[2].role`."""
    path = ""
    for i, step in enumerate(loc):
        if isinstance(step, int):
            path += f"[{step}]"
        elif i == 0:
            path = names.get(step, step)
        else:
            path += f".{step}"
    return path


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")

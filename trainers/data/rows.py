"""Reads a line of a data file: `parse_row` gives a dialog, `parse_pair` the two dialogs of a row of preferences.

A row is in our own format (`TrainingDataItem`, `PreferenceDataItem`) or in OpenAI's. For a row that can't be trained
on, they raise a RowError that says why in one sentence.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from trainers.data.dialog import (
    MAX_ROW_BYTES,
    Dialog,
    Pair,
    PreferenceDataItem,
    RowError,
    TrainingDataItem,
    check_order,
    json_type,
    normalised,
    short,
)

_OF_SAMPLING = ("parallel_tool_calls",)
"""Keys of OpenAI's rows that only concern sampling, and are ignored."""
_PREFERENCE_KEYS = ("chosen", "rejected", "preferred_output", "non_preferred_output")


def parse_row(raw: bytes) -> Dialog:
    """Reads one line. Raises RowError for anything that can't be trained on."""
    row = _read_object(raw)
    if preferences := [key for key in _PREFERENCE_KEYS if key in row]:
        raise RowError(
            f"the row has '{preferences[0]}': it is a preference pair, which only DPO trains on (set extras.loss to "
            "torchtune.rlhf.loss.DPOLoss)"
        )
    field = "dialog"
    if "messages" in row:
        field, row = "messages", _from_openai(row)
    elif "dialog" not in row:
        for key, hint in _OTHER_FORMATS.items():
            if key in row:
                raise RowError(f"the row has '{key}' and no messages: {hint}")
        raise RowError("the row has no messages: write it as a list of them, each with role and content")
    try:
        item = TrainingDataItem.model_validate(row)
    except ValidationError as error:
        raise RowError(_sentence(error.errors(include_url=False)[0], {"dialog": field})) from None
    return normalised(item.dialog, item.mask, item.tools, lambda i: f"{field}[{i}]")


def parse_pair(raw: bytes) -> Pair:
    """Reads one line of preferences: as `PreferenceDataItem` has it (`messages` and TRL's `prompt` are other names of
    `dialog`), or as OpenAI has it: `{"input": {"messages", "tools"}, "preferred_output", "non_preferred_output"}`.
    Raises RowError for anything that can't be trained on."""
    row, names = _with_our_names(_read_object(raw))
    try:
        item = PreferenceDataItem.model_validate(row)
    except ValidationError as error:
        raise RowError(_sentence(error.errors(include_url=False)[0], names)) from None
    _check_pair(item, names)
    return Pair(*(_side(item, side, names) for side in ("chosen", "rejected")))


def _with_our_names(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The row with the keys of PreferenceDataItem, and the row's own name for each of them."""
    if "keep_loss" in row:
        raise RowError("a row of preferences can't have keep_loss: what the two dialogs don't share is trained on")
    names = {name: name for name in PreferenceDataItem.model_fields}
    if row.keys() & {"preferred_output", "non_preferred_output"}:
        names |= {"chosen": "preferred_output", "rejected": "non_preferred_output"}
        names |= {"dialog": "input.messages", "tools": "input.tools"}
        given = row.get("input")
        if not isinstance(given, dict):
            raise RowError("input must be an object with messages" if "input" in row else "input is missing")
        if "messages" not in given:
            raise RowError("input.messages is missing")
        row = {key: value for key, value in row.items() if key != "input"} | {
            f"input.{key}": value for key, value in given.items() if key not in _OF_SAMPLING
        }
    else:
        names["dialog"] = next((name for name in ("messages", "prompt") if name in row), "dialog")
    if not row.keys() & {names["chosen"], names["rejected"]}:
        raise RowError(
            "the row has no 'chosen' and 'rejected', which DPO trains on: to train on rows with a single dialog, leave "
            "extras.loss out"
        )
    _refuse_texts(row, names)
    for ours, theirs in names.items():
        if ours != theirs and ours in row:
            raise RowError(f"the row has both '{theirs}' and '{ours}': use one of the two formats")
    ours_of = {theirs: ours for ours, theirs in names.items()}
    for theirs in (names["dialog"], names["chosen"], names["rejected"]):
        messages = row.get(theirs)
        if isinstance(messages, dict):
            row[theirs] = _as_row_message(messages, theirs)
        elif isinstance(messages, list):
            row[theirs] = [
                _as_row_message(message, f"{theirs}[{i}]") if isinstance(message, dict) else message
                for i, message in enumerate(messages)
            ]
    return {ours_of.get(key, key): value for key, value in row.items()}, names


_QUESTIONS = ("prompt", "question", "input", "instruction")
"""Names of the user's message in formats whose messages are plain strings."""


def _refuse_texts(row: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises RowError if there are strings instead of messages, as in many public data sets of preferences."""
    question = next((key for key in _QUESTIONS if isinstance(row.get(key), str)), None)
    for side in (names["chosen"], names["rejected"]):
        text = row.get(side)
        if not isinstance(text, str):
            continue
        if text.lstrip().startswith("Human:"):
            raise RowError(
                f"{side} is a transcript: write it as a list of messages, with the role user for Human and assistant "
                "for Assistant"
            )
        before = f" and {question} as the user's message in dialog" if question else ""
        before += ", behind the system's" if question and isinstance(row.get("system"), str) else ""
        raise RowError(
            f'{side} must be a message or a list of messages, not a string: write {{"role": "assistant", "content": '
            f"...}}{before}"
        )
    if question:
        chosen = row.get(names["chosen"])
        first = chosen[0] if isinstance(chosen, list) and chosen else chosen
        if isinstance(first, dict) and first.get("role") != "assistant":
            raise RowError(
                f"the row has '{question}' as a string, but {names['chosen']} and {names['rejected']} are whole "
                f"dialogs: leave out everything but {names['chosen']} and {names['rejected']}"
            )
        raise RowError(f"the row has '{question}' as a string: write it as the user's message in dialog")


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
                f"{chosen} and {rejected} must differ from an assistant message on: the first message of {name} that "
                f"they don't share {what}"
            )
        try:
            check_order(messages)
        except RowError as error:
            raise RowError(f"in the whole dialog of {name}, {error}") from None


def _side(item: PreferenceDataItem, side: Literal["chosen", "rejected"], names: Mapping[str, str]) -> Dialog:
    messages = item.dialogs[0 if side == "chosen" else 1]
    before, shared = len(item.dialog or ()), item.shared
    keep = tuple(i >= shared and message.role == "assistant" for i, message in enumerate(messages))

    def where(i: int) -> str:
        return f"{names['dialog']}[{i}]" if i < before else f"{names[side]}[{i - before}]"

    return normalised(messages, keep, item.tools, where)


def _article(role: str) -> str:
    return f"an {role}" if role == "ipython" else f"a {role}"


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
        reason = f"{error}".replace(" at line 1 column ", " at column ")  # not the line number in the file
        for told in ("unexpected end of hex escape", "lone leading surrogate in hex escape"):
            reason = reason.replace(told, "half of a surrogate pair, as where a text was cut within an emoji,")
        raise RowError(f"the line is not JSON: {reason}") from None
    if not isinstance(row, dict):
        raise RowError(f"the line is not a JSON object but {json_type(row)}")
    return row


_OTHER_FORMATS = {
    "conversations": "write ShareGPT's rows as messages, with 'role' for 'from' (user for human, assistant for gpt) "
    "and 'content' for 'value'",
    "instruction": "write Alpaca's rows as messages, with instruction and input as the user's, output as the "
    "assistant's",
    "prompt": "write the prompt as the user's message, the completion as the assistant's",
    "text": "plain text is not trained on; write it as messages, what is to be learned as the assistant's",
}
_OF_ANSWERS = ("refusal", "annotations", "audio", "function_call", "tool_calls")
"""Keys that OpenAI's client writes with every answer, null or empty if they don't apply."""


def without_empty(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys of `_OF_ANSWERS` that are null or empty."""
    return {key: value for key, value in message.items() if key not in _OF_ANSWERS or value not in (None, [], {}, "")}


def _as_row_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message of OpenAI's API in the format of our rows. What the two have in common is checked later."""
    ours = without_empty(message)
    if "function_call" in ours:
        raise RowError(f"{where} has a function_call, which OpenAI has replaced: write it as one of tool_calls")
    if ours.get("role") == "function":
        raise RowError(
            f"{where} has the role 'function', which OpenAI has replaced: write 'tool', and tool_calls before"
        )
    return ours | {"role": "system"} if ours.get("role") == "developer" else ours


def _from_openai(row: dict[str, Any]) -> dict[str, Any]:
    """Turns a row with `messages` and weights into one with `dialog` and `keep_loss`. What the two formats have in
    common is checked later."""
    if replaced := row.keys() & {"functions", "function_call"}:
        raise RowError(
            f"the row has '{min(replaced)}', which OpenAI has replaced: write the functions as tools, each "
            '{"type": "function", "function": {...}}'
        )
    clash = row.keys() & {"dialog", "keep_loss"}
    if clash:
        raise RowError(f"the row has both 'messages' and '{min(clash)}': use one of the two formats")
    messages = row["messages"]
    if not isinstance(messages, list):
        raise RowError(f"messages must be a list, not {json_type(messages)}")
    dialog, keep = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(f"messages[{i}] must be an object, not {json_type(message)}")
        is_assistant = message.get("role") == "assistant"
        weight = message.get("weight")
        if weight is not None:
            if not is_assistant:
                raise RowError(f"messages[{i}] has a weight, which only an assistant message may have")
            if weight not in (0, 1):
                raise RowError(f"messages[{i}].weight must be 0 or 1, not {short(weight)}")
        keep.append(is_assistant and weight != 0)
        plain = {key: value for key, value in message.items() if key != "weight"}
        dialog.append(_as_row_message(plain, f"messages[{i}]"))
    if any(keep) != any(message.get("role") == "assistant" for message in dialog):
        raise RowError("nothing to train on: the weight of every assistant message is 0")
    rest = {key: value for key, value in row.items() if key not in ("messages", *_OF_SAMPLING)}
    return rest | {"dialog": dialog, "keep_loss": keep if any(keep) else None}


_OF_REASONING = ("'reasoning_content'", "'reasoning'", "'thinking'")
_EXPECTED = {
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "string_type": "a string",
    "bool_type": "true or false",
}


def _sentence(error: ErrorDetails, names: Mapping[str, str]) -> str:
    """A message about an error of pydantic's. `names`: the row's names for our fields."""
    path = _path(error["loc"], names)
    kind = error["type"]
    if kind == "extra_forbidden":
        parent, key = _path(error["loc"][:-1], names), short(error["loc"][-1])
        hint = ": write it into content, before the answer, as <think>...</think>" if key in _OF_REASONING else ""
        return f"unknown key {key} in {parent}{hint}" if parent else f"unknown key {key}"
    if kind == "missing":
        return f"{path} is missing"
    if kind == "literal_error":
        return f"{path} must be {error['ctx']['expected']}, not {short(error['input'])}"
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
        elif step != "str" and "[" not in step:  # pydantic's names for members of a union
            path += f".{step}"
    return path

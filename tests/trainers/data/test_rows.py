"""Rows as in OpenAI's documentation and client, and rows of other formats."""

import json
from typing import Any

import pytest

from tests.trainers.data.support import assistant, call, system, tool_result, user
from trainers.data.dialog import Dialog, RowError
from trainers.data.rows import parse_pair, parse_row

ASK, ANSWER = user("How many?"), assistant("Seven.")
TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}]
AS_THE_CLIENT_DUMPS_IT: dict[str, object] = {
    "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None
}  # fmt: skip


def row(value: object) -> Dialog:
    return parse_row(json.dumps(value).encode())


def test_openais_row_with_tools_may_say_how_they_are_called() -> None:
    messages = [
        ASK,
        assistant(None, tool_calls=[call("count", {}, id="c1")]),
        tool_result("7", tool_call_id="c1"),
        ANSWER,
    ]
    said = {"messages": messages, "tools": TOOLS, "parallel_tool_calls": False}
    assert row(said) == row({"dialog": messages, "tools": TOOLS})


@pytest.mark.parametrize("more", [AS_THE_CLIENT_DUMPS_IT, {"tool_calls": []}])
def test_an_answer_as_openais_client_writes_it_is_accepted(more: dict[str, Any]) -> None:
    assert row({"messages": [ASK, ANSWER | more]}) == row({"dialog": [ASK, ANSWER]})


def test_the_role_developer_means_system() -> None:
    said = system("Count.")
    assert row({"messages": [said | {"role": "developer"}, ASK, ANSWER]}) == row({"dialog": [said, ASK, ANSWER]})


def test_messages_of_preferences_are_read_in_the_same_way() -> None:
    developer, worse = system("Count.") | {"role": "developer"}, assistant("Eight.")
    plain = {"dialog": [system("Count."), ASK], "chosen": ANSWER, "rejected": worse}
    said = {
        "input": {"messages": [developer, ASK]},
        "preferred_output": [ANSWER | AS_THE_CLIENT_DUMPS_IT],
        "non_preferred_output": worse | AS_THE_CLIENT_DUMPS_IT,
    }
    assert parse_pair(json.dumps(said).encode()) == parse_pair(json.dumps(plain).encode())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a refusal": (
        {"messages": [ASK, ANSWER | {"refusal": "no"}]},
        "unknown key 'refusal' in messages[1]",
    ),
    "reasoning beside the answer": (
        {"messages": [ASK, ANSWER | {"reasoning_content": "Hm."}]},
        "unknown key 'reasoning_content' in messages[1]: write it into content, before the answer, as "
        "<think>...</think>",
    ),
    "another format": (
        {"question": "x", "answer": "y"},
        "the row has no messages: write it as a list of them, each with role and content",
    ),
    "functions": (
        {"messages": [ASK, ANSWER], "functions": [{"name": "count"}]},
        "the row has 'functions', which OpenAI has replaced: write the functions as tools, each "
        '{"type": "function", "function": {...}}',
    ),
    "a function call": (
        {"messages": [ASK, assistant(None, function_call={"name": "count", "arguments": "{}"})]},
        "messages[1] has a function_call, which OpenAI has replaced: write it as one of tool_calls",
    ),
    "a function's result": (
        {"messages": [ASK, ANSWER, {"role": "function", "name": "count", "content": "7"}]},
        "messages[2] has the role 'function', which OpenAI has replaced: write 'tool', and tool_calls before",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        "the row has 'conversations' and no messages: write ShareGPT's rows as messages, with 'role' for 'from' (user "
        "for human, assistant for gpt) and 'content' for 'value'",
    ),
    "Alpaca": (
        {"instruction": "x", "input": "", "output": "y"},
        "the row has 'instruction' and no messages: write Alpaca's rows as messages, with instruction and input as the "
        "user's, output as the assistant's",
    ),
    "a completion": (
        {"prompt": "x", "completion": "y"},
        "the row has 'prompt' and no messages: write the prompt as the user's message, the completion as the "
        "assistant's",
    ),
    "plain text": (
        {"text": "x"},
        "the row has 'text' and no messages: plain text is not trained on; write it as messages, what is to be learned "
        "as the assistant's",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_write_instead(name: str) -> None:
    value, sentence = REFUSED[name]
    with pytest.raises(RowError) as caught:
        row(value)
    assert str(caught.value) == sentence


HUMAN = "\n\nHuman: How many?\n\nAssistant: "
REFUSED_PREFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "TRL's strings": (
        {"prompt": "How many?", "chosen": "Seven.", "rejected": "Eight."},
        'chosen must be a message or a list of messages, not a string: write {"role": "assistant", "content": ...} and '
        "prompt as the user's message in dialog",
    ),
    "orca_dpo_pairs": (
        {"system": "Count.", "question": "How many?", "chosen": "Seven.", "rejected": "Eight."},
        'chosen must be a message or a list of messages, not a string: write {"role": "assistant", "content": ...} and '
        "question as the user's message in dialog, behind the system's",
    ),
    "HH-RLHF": (
        {"chosen": f"{HUMAN}Seven.", "rejected": f"{HUMAN}Eight."},
        "chosen is a transcript: write it as a list of messages, with the role user for Human and assistant for "
        "Assistant",
    ),
    "ultrafeedback": (
        {"prompt": "How many?", "prompt_id": "1", "chosen": [ASK, ANSWER], "rejected": [ASK, assistant("Eight.")]},
        "the row has 'prompt' as a string, but chosen and rejected are whole dialogs: leave out everything but chosen "
        "and rejected",
    ),
    "a question of text": (
        {"input": "How many?", "chosen": ANSWER, "rejected": assistant("Eight.")},
        "the row has 'input' as a string: write it as the user's message in dialog",
    ),
}


@pytest.mark.parametrize("name", REFUSED_PREFERENCES)
def test_preferences_of_other_formats_say_what_to_write_instead(name: str) -> None:
    value, sentence = REFUSED_PREFERENCES[name]
    with pytest.raises(RowError) as caught:
        parse_pair(json.dumps(value).encode())
    assert str(caught.value) == sentence

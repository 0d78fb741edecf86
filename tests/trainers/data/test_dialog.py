"""Rows in both formats, and the messages about everything that can be wrong with one."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.trainers.data.support import assistant, call, system, tool_result, user
from trainers.data.dialog import MAX_ROW_BYTES, Dialog, Pair, RowError, TrainingDataItem
from trainers.data.rows import parse_pair, parse_row

ASK, ANSWER = user("How many?"), assistant("Seven.")
CALL = assistant(None, tool_calls=[call("count", {"what": "birds"}, id="c1")])


def row(value: object) -> Dialog:
    return parse_row(json.dumps(value).encode())


def test_assistant_messages_are_trained_on_by_default() -> None:
    parsed = row({"dialog": [system("Count."), ASK, ANSWER, ASK, ANSWER]})
    assert parsed.keep_loss == (False, False, True, False, True)
    assert parsed.messages[0] == {"role": "system", "content": "Count."}


def test_keep_loss_is_taken_as_it_is() -> None:
    assert row({"dialog": [ASK, ANSWER], "keep_loss": [True, False]}).keep_loss == (True, False)


def test_a_dialog_without_an_assistant_can_be_trained_on_when_keep_loss_says_so() -> None:
    assert row({"dialog": [ASK], "keep_loss": [True]}).keep_loss == (True,)


def test_any_order_of_roles_is_allowed_after_the_system_message() -> None:
    assert len(row({"dialog": [ANSWER, ANSWER, ASK, ASK, ANSWER]}).messages) == 5


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    assert row({"dialog": [user(parts), ANSWER]}).messages[0] == ASK


def test_tool_calls_reach_the_template_with_their_arguments_as_an_object() -> None:
    parsed = row({"dialog": [ASK, CALL, tool_result("7", tool_call_id="c1"), ANSWER]})
    function = {"name": "count", "arguments": {"what": "birds"}}
    assert parsed.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    assert parsed.messages[2] == {"role": "tool", "content": "7", "tool_call_id": "c1"}
    assert parsed.keep_loss == (False, True, False, True)


def test_arguments_may_be_an_object_already() -> None:
    calls = [{"function": {"name": "count", "arguments": {"what": "birds"}}}]
    assert row({"dialog": [ASK, assistant("", tool_calls=calls)]}).messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "count", "arguments": {"what": "birds"}}}
    ]


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_may_have_no_arguments(arguments: object) -> None:
    calls = [{"function": {"name": "count", "arguments": arguments}}]
    (called,) = row({"dialog": [ASK, assistant("", tool_calls=calls)]}).messages[1]["tool_calls"]
    assert called["function"] == {"name": "count", "arguments": {}}


def test_ipython_is_another_name_for_tool() -> None:
    assert row({"dialog": [ASK, CALL, {"role": "ipython", "content": "7"}, ANSWER]}).messages[2]["role"] == "tool"


def test_tools_reach_the_template_whole() -> None:
    tool = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}, "strict": True}}
    assert row({"messages": [ASK, CALL], "tools": [tool]}).tools == (tool,)


def test_openais_weights_become_keep_loss() -> None:
    messages = [ASK, ANSWER | {"weight": 0}, ASK, ANSWER | {"weight": 1}, ANSWER]
    parsed = row({"messages": messages})
    assert parsed.keep_loss == (False, False, False, True, True)
    assert parsed.messages[1] == ANSWER


def test_openais_format_without_weights_is_the_same_row() -> None:
    assert row({"messages": [ASK, ANSWER]}) == row({"dialog": [ASK, ANSWER]})


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([1], "the line is not a JSON object but a list"),
    "null": (None, "the line is not a JSON object but null"),
    "nothing": ({}, "the row has no messages: write it as a list of them, each with role and content"),
    "an empty dialog": ({"dialog": []}, "the dialog is empty"),
    "no list": ({"dialog": "hello"}, "dialog must be a list"),
    "no object": ({"dialog": [3]}, "dialog[0] must be an object"),
    "an unknown key": ({"dialog": [ASK, ANSWER], "keep": [True]}, "unknown key 'keep'"),
    "an unknown key in a message": ({"dialog": [ASK | {"mood": 1}, ANSWER]}, "unknown key 'mood' in dialog[0]"),
    "no role": ({"dialog": [{"content": "x"}, ANSWER]}, "dialog[0].role is missing"),
    "a bad role": (
        {"dialog": [{"role": "boss", "content": "x"}, ANSWER]},
        "dialog[0].role must be 'system', 'user', 'assistant', 'tool' or 'ipython', not 'boss'",
    ),
    "no content": ({"dialog": [{"role": "user"}, ANSWER]}, "dialog[0] has neither content nor tool_calls"),
    "a bad content": (
        {"dialog": [{"role": "user", "content": 5}, ANSWER]},
        "dialog[0].content must be a string, a list of text parts, or null",
    ),
    "an image": (
        {"dialog": [user([{"type": "image_url"}]), ANSWER]},
        "dialog[0].content holds a part of type 'image_url', and only text is taken",
    ),
    "a part without text": (
        {"dialog": [user([{"type": "text"}]), ANSWER]},
        "dialog[0].content holds a text part whose text is not a string",
    ),
    "a part with more": (
        {"dialog": [user([{"type": "text", "text": "a", "size": "b"}]), ANSWER]},
        "dialog[0].content holds a text part with the unknown key 'size'",
    ),
    "a late system message": (
        {"dialog": [ASK, system("x"), ANSWER]},
        "the system message at 1 is not the first message",
    ),
    "a result without a call": (
        {"dialog": [ASK, tool_result("7"), ANSWER]},
        "the tool result at 1 has no tool call before it",
    ),
    "a result of another call": (
        {"dialog": [ASK, CALL, tool_result("7", tool_call_id="c2"), ANSWER]},
        "the tool_call_id of the tool result at 2 names no call before it",
    ),
    "a call by the user": (
        {"dialog": [ASK | {"tool_calls": CALL["tool_calls"]}, ANSWER]},
        "dialog[0] has tool_calls, which only an assistant message may have",
    ),
    "a call id on an answer": (
        {"dialog": [ASK, ANSWER | {"tool_call_id": "c1"}]},
        "dialog[1] has a tool_call_id, which only a tool message may have",
    ),
    "arguments that are not JSON": (
        {"dialog": [ASK, assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{a"}}])]},
        "the arguments of a tool call of dialog[1] are not JSON: key must be a string at line 1 column 2",
    ),
    "arguments that are a list": (
        {"dialog": [ASK, assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])]},
        "the arguments of a tool call of dialog[1] are not a JSON object but a list",
    ),
    "arguments that are a number": (
        {"dialog": [ASK, assistant(None, tool_calls=[{"function": {"name": "f", "arguments": 1}}])]},
        "dialog[1].tool_calls[0].function.arguments must be a JSON object, or one written as a string",
    ),
    "a short mask": (
        {"dialog": [ASK, ANSWER], "keep_loss": [True]},
        "keep_loss has 1 entries for 2 messages",
    ),
    "numbers in the mask": ({"dialog": [ASK, ANSWER], "keep_loss": [0, 1]}, "keep_loss[0] must be true or false"),
    "an all-false mask": (
        {"dialog": [ASK, ANSWER], "keep_loss": [False, False]},
        "nothing to train on: keep_loss is false for every message",
    ),
    "no assistant": ({"dialog": [ASK]}, "nothing to train on: there is no assistant message"),
    "weights all 0": (
        {"messages": [ASK, ANSWER | {"weight": 0}]},
        "nothing to train on: the weight of every assistant message is 0",
    ),
    "a weight of 2": (
        {"messages": [ASK, ANSWER | {"weight": 2}]},
        "messages[1].weight must be 0 or 1, not 2",
    ),
    "a weight on the user": (
        {"messages": [ASK | {"weight": 1}, ANSWER]},
        "messages[0] has a weight, which only an assistant message may have",
    ),
    "both formats": (
        {"messages": [ASK, ANSWER], "keep_loss": [False, True]},
        "the row has both 'messages' and 'keep_loss': use one of the two formats",
    ),
    "messages of another type": ({"messages": 3}, "messages must be a list, not a number"),
    "a message of another type": ({"messages": [None]}, "messages[0] must be an object, not null"),
    "an unknown role among messages": (
        {"messages": [{"role": "boss", "content": "x"}, ANSWER]},
        "messages[0].role must be 'system', 'user', 'assistant', 'tool' or 'ipython', not 'boss'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_row_is_said_in_one_sentence(name: str) -> None:
    value, sentence = BAD[name]
    with pytest.raises(RowError) as caught:
        row(value)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"hello", "the line is not JSON"),
        (b'{"dialog": [', "the line is not JSON"),
        (b'{"dialog": "\xff"}', "the line is not UTF-8 text"),
        (b'{"dialog": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
        (b'{"dialog": [{"role": "user", "content": "\\ude00"}]}', "half of a surrogate pair"),
        (b"[" * 100_000, "the line is not JSON"),
        (b'{"dialog": [], "tools": [NaN]}', "the line is not JSON"),
        (b'{"dialog": [], "tools": [-Infinity]}', "the line is not JSON"),
        (b" " * (MAX_ROW_BYTES + 1), "the line is longer than"),
    ],
)
def test_bytes_that_are_not_a_row_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(RowError, match=words):
        parse_row(raw)


def test_an_error_does_not_repeat_the_row() -> None:
    secret = "s3cret " * 100
    for value in ({"dialog": [{"role": secret, "content": secret}]}, {secret: 1, "dialog": [ASK, ANSWER]}, [secret]):
        with pytest.raises(RowError) as caught:
            row(value)
        assert len(str(caught.value)) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dialog", "messages", "role", "content", "weight", "tools"]), inner)
    ),
    max_leaves=10,
)


@given(JSON)
def test_no_json_makes_anything_but_a_dialog_or_a_row_error(value: object) -> None:
    try:
        parsed = row(value)
    except RowError:
        return
    assert any(parsed.keep_loss)


def test_the_schema_for_openapi_names_every_field_and_role() -> None:
    schema = TypeAdapter(TrainingDataItem).json_schema()
    assert set(schema["properties"]) == {"dialog", "keep_loss", "tools"}
    assert schema["$defs"]["Message"]["properties"]["role"]["enum"] == [
        "system",
        "user",
        "assistant",
        "tool",
        "ipython",
    ]


WORSE = assistant("Eight.")


def pair(value: object) -> Pair:
    return parse_pair(json.dumps(value).encode())


PREFERENCES: dict[str, Any] = {
    "whole dialogs": {"chosen": [system("Count."), ASK, ANSWER], "rejected": [system("Count."), ASK, WORSE]},
    "a dialog and answers": {"dialog": [system("Count."), ASK], "chosen": [ANSWER], "rejected": [WORSE]},
    "messages and an answer each": {"messages": [system("Count."), ASK], "chosen": ANSWER, "rejected": WORSE},
    "trl": {"prompt": [system("Count."), ASK], "chosen": [ANSWER], "rejected": [WORSE]},
    "openai": {
        "input": {"messages": [system("Count."), ASK], "parallel_tool_calls": True},
        "preferred_output": [ANSWER],
        "non_preferred_output": [WORSE],
    },
}


@pytest.mark.parametrize("value", PREFERENCES.values(), ids=PREFERENCES)
def test_every_format_of_preferences_means_the_same_two_dialogs(value: dict[str, Any]) -> None:
    chosen, rejected = pair(value)
    assert chosen == row({"dialog": [system("Count."), ASK, ANSWER]})
    assert rejected == row({"dialog": [system("Count."), ASK, WORSE]})


def test_only_answers_after_the_shared_beginning_are_trained_on() -> None:
    begin = [ASK, ANSWER, ASK]
    chosen, rejected = pair({"chosen": [*begin, ANSWER, ASK, ANSWER], "rejected": [*begin, WORSE]})
    assert chosen.keep_loss == (False, False, False, True, False, True)
    assert rejected.keep_loss == (False, False, False, True)


def test_tools_of_preferences_reach_both_dialogs() -> None:
    tool = {"type": "function", "function": {"name": "count"}}
    both = pair(
        {"input": {"messages": [ASK], "tools": [tool]}, "preferred_output": [CALL], "non_preferred_output": [WORSE]}
    )
    assert [side.tools for side in both] == [(tool,), (tool,)]
    assert both.chosen.messages[1]["tool_calls"]


BAD_PREFERENCES: dict[str, tuple[Any, str]] = {
    "a supervised row": (
        {"dialog": [ASK, ANSWER]},
        "the row has no 'chosen' and 'rejected', which DPO trains on: to train on rows with a single dialog, leave "
        "extras.loss out",
    ),
    "one side": ({"chosen": [ASK, ANSWER]}, "rejected is missing"),
    "the same twice": (
        {"dialog": [ASK], "chosen": ANSWER, "rejected": ANSWER},
        "chosen and rejected are the same: there is nothing to prefer",
    ),
    "different prompts": (
        {"chosen": [ASK, ANSWER], "rejected": [user("Why?"), WORSE]},
        "chosen and rejected don't begin with the same message: they must answer the same prompt",
    ),
    "prompts that part later": (
        {"chosen": [system("x"), ASK, ANSWER], "rejected": [system("x"), user("Why?"), WORSE]},
        "chosen and rejected must differ from an assistant message on: the first message of chosen that they don't "
        "share is a user message",
    ),
    "one that stops": (
        {"chosen": [ASK, ANSWER, ASK, ANSWER], "rejected": [ASK, ANSWER]},
        "chosen and rejected must differ from an assistant message on: the first message of chosen that they don't "
        "share is a user message",
    ),
    "no prompt": ({"dialog": [], "chosen": ANSWER, "rejected": WORSE}, "dialog is empty"),
    "no answer": ({"dialog": [ASK], "chosen": [], "rejected": WORSE}, "chosen is empty"),
    "the prompt twice": (
        {"dialog": [ASK], "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]},
        "chosen must begin with an assistant message: what it answers stands in dialog already",
    ),
    "a string": (
        {"dialog": [ASK], "chosen": ANSWER, "rejected": "no"},
        'rejected must be a message or a list of messages, not a string: write {"role": "assistant", "content": ...}',
    ),
    "a number": ({"dialog": [ASK], "chosen": 3, "rejected": WORSE}, "chosen must be a list"),
    "a bad role": (
        {
            "input": {"messages": [ASK]},
            "preferred_output": [{"role": 5, "content": ""}],
            "non_preferred_output": [WORSE],
        },
        "preferred_output[0].role must be 'system', 'user', 'assistant', 'tool' or 'ipython', not 5",
    ),
    "a bad message before them": (
        {"dialog": [ASK, {"role": "assistant"}], "chosen": ANSWER, "rejected": WORSE},
        "dialog[1] has neither content nor tool_calls",
    ),
    "an unknown key before them": (
        {"prompt": [ASK | {"id": 1}], "chosen": ANSWER, "rejected": WORSE},
        "unknown key 'id' in prompt[0]",
    ),
    "a prompt that is no list": (
        {"input": {"messages": ASK}, "preferred_output": ANSWER, "non_preferred_output": WORSE},
        "input.messages must be a list",
    ),
    "tools that are no list": (
        {"dialog": [ASK], "tools": 1, "chosen": ANSWER, "rejected": WORSE},
        "tools must be a list",
    ),
    "a tool without an object": (
        {
            "dialog": [ASK],
            "tools": [{"function": {"name": "f", "parameters": 1, "description": 2}}],
            "chosen": ANSWER,
            "rejected": WORSE,
        },
        "tools[0].function.description must be a string",
    ),
    "no input": ({"preferred_output": [ANSWER], "non_preferred_output": [WORSE]}, "input is missing"),
    "no messages": (
        {"input": {}, "preferred_output": ANSWER, "non_preferred_output": WORSE},
        "input.messages is missing",
    ),
    "an input of text": ({"input": "x", "preferred_output": ANSWER}, "input must be an object with messages"),
    "two formats": (
        {"input": {"messages": [ASK]}, "preferred_output": ANSWER, "non_preferred_output": WORSE, "chosen": ANSWER},
        "the row has both 'preferred_output' and 'chosen': use one of the two formats",
    ),
    "keep_loss": (
        {"dialog": [ASK], "chosen": ANSWER, "rejected": WORSE, "keep_loss": [True, False]},
        "a row of preferences can't have keep_loss: what the two dialogs don't share is trained on",
    ),
    "an unknown key": ({"score": 1, "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]}, "unknown key 'score'"),
    "the prompt by two names": (
        {"prompt": [ASK], "dialog": [ASK], "chosen": ANSWER, "rejected": WORSE},
        "the row has both 'prompt' and 'dialog': use one of the two formats",
    ),
    "a late system message": (
        {"dialog": [ASK], "chosen": [ANSWER, system("x"), ANSWER], "rejected": WORSE},
        "in the whole dialog of chosen, the system message at 2 is not the first message",
    ),
}


@pytest.mark.parametrize(("value", "sentence"), BAD_PREFERENCES.values(), ids=BAD_PREFERENCES)
def test_preferences_that_cannot_be_trained_on_say_why(value: object, sentence: str) -> None:
    with pytest.raises(RowError) as caught:
        pair(value)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("value", PREFERENCES.values(), ids=PREFERENCES)
def test_preferences_in_a_supervised_job_are_told_of_dpo(value: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=r"preference pair, which only DPO trains on \(set extras.loss"):
        row(value)


PREFERENCE_KEYS = ["dialog", "messages", "prompt", "input", "chosen", "rejected", "preferred_output", "role", "content"]


@given(
    st.recursive(
        st.none() | st.integers() | st.sampled_from(["assistant", "user"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PREFERENCE_KEYS), inner),
        max_leaves=12,
    )
)
def test_no_json_makes_anything_but_a_pair_or_a_row_error(value: object) -> None:
    try:
        parsed = pair(value)
    except RowError:
        return
    assert all(any(side.keep_loss) for side in parsed)

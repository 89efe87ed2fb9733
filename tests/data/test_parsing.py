"""Claims: a good row becomes messages as the template will see them, with the trainer's own keys taken out; errors of
bad rows are in test_bad_data.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.rows import conversation_row

from mtr.data.conversation import Conversation, Message
from mtr.data.parsing import parse_row
from mtr.errors import UserError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def parse(*messages: Any, **columns: Any) -> Conversation:
    return parse_row({"messages": list(messages), **columns}, "rows.jsonl, line 3")


def test_a_plain_row_is_kept_as_it_is() -> None:
    row = conversation_row(turns=2)
    conversation = parse_row(row, "rows.jsonl, line 3")
    assert [dict(message.data) for message in conversation.messages] == row["messages"]
    assert [message.weight for message in conversation.messages] == [1.0] * 4
    assert conversation.turns == [1, 3]
    assert conversation.where == "rows.jsonl, line 3"
    assert conversation.tools is None
    assert conversation.row is row


def test_every_role_is_known() -> None:
    roles = ["system", "developer", "user", "assistant", "tool", "assistant"]
    conversation = parse(*({"role": role, "content": "x"} for role in roles))
    assert [message.role for message in conversation.messages] == roles
    assert conversation.turns == [3, 5]


def test_a_message_may_have_more_keys_and_nulls_are_left_out() -> None:
    (_, message) = parse(USER, {**ANSWER, "name": "Bo", "tool_calls": None, "reasoning_content": None}).messages
    assert dict(message.data) == {**ANSWER, "name": "Bo"}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_found_in_each_field_that_templates_read(key: str) -> None:
    (_, message) = parse(USER, {**ANSWER, key: "hm"}).messages
    assert message.thinking == "hm"
    assert message.data[key] == "hm"


def test_a_message_without_thinking_has_none_and_empty_thinking_is_not_none() -> None:
    assert Message(ANSWER).thinking is None
    assert Message({**ANSWER, "thinking": ""}).thinking == ""


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert parse(USER, {"role": "assistant", "content": parts}).messages[1].content == "Hello"


@pytest.mark.parametrize(
    "thought", ["Hm. Yes.", [{"type": "text", "text": "Hm. "}, {"type": "text", "text": "Yes."}]], ids=["text", "parts"]
)
def test_thinking_parts_stay_parts(thought: Any) -> None:
    parts = [{"type": "thinking", "thinking": thought}, *({"type": "text", "text": t} for t in ("Hel", "lo"))]
    (_, message) = parse(USER, {"role": "assistant", "content": parts}).messages
    assert (message.thinking, message.content, message.in_parts) == ("Hm. Yes.", "Hello", True)
    assert message.data["content"] == [{"type": "thinking", "thinking": "Hm. Yes."}, {"type": "text", "text": "Hello"}]


def test_a_blank_thinking_part_is_no_thinking() -> None:
    parts = [{"type": "thinking", "thinking": " \n"}, {"type": "text", "text": "Hello"}]
    (_, message) = parse(USER, {"role": "assistant", "content": parts}).messages
    assert dict(message.data) == ANSWER


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, 1.0),
        ({"train": False}, 0.0),
        ({"train": True}, 1.0),
        ({"weight": 0}, 0.0),
        ({"weight": 0.5}, 0.5),
        ({"loss": False}, 0.0),
        ({"loss_weight": 2}, 2.0),
        ({"train": True, "weight": 0.25}, 0.25),
        ({"train": False, "weight": 3}, 0.0),
    ],
)
def test_the_weight_of_a_message_is_taken_out_of_it(keys: dict[str, Any], weight: float) -> None:
    (_, message) = parse(USER, {**ANSWER, **keys}).messages
    assert message.weight == weight
    assert dict(message.data) == ANSWER


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}],
        json.dumps([CALL]),
    ],
)
def test_tool_calls_are_objects_however_they_are_written(calls: Any) -> None:
    (_, message) = parse(USER, {"role": "assistant", "tool_calls": calls}).messages
    assert message.tool_calls == [CALL]
    assert message.content == ""


def test_a_call_without_its_function_wrapper_is_kept_flat() -> None:
    (_, message) = parse(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": ""}]}).messages
    assert message.tool_calls == [{"name": "f", "arguments": {}}]


@pytest.mark.parametrize("calls", [None, [], "[]"])
def test_no_tool_calls_are_no_tool_calls(calls: Any) -> None:
    (_, message) = parse(USER, {**ANSWER, "tool_calls": calls}).messages
    assert message.tool_calls == []
    assert "tool_calls" not in message.data


def test_parsing_leaves_the_row_alone() -> None:
    row = {
        "messages": [USER, {**ANSWER, "weight": 0.5, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]
    }
    before = json.dumps(row)
    parse_row(row, "x")
    assert json.dumps(row) == before


@pytest.mark.parametrize("tools", [[{"name": "f"}], json.dumps([{"name": "f"}])])
def test_tools_are_a_list_or_its_json(tools: Any) -> None:
    assert parse(USER, ANSWER, tools=tools).tools == [{"name": "f"}]


@pytest.mark.parametrize("tools", [None, [], "[]"])
def test_no_tools_are_none(tools: Any) -> None:
    assert parse(USER, ANSWER, tools=tools).tools is None


def test_messages_may_be_json_text_and_columns_may_have_other_names() -> None:
    row = {"chat": json.dumps([USER, ANSWER]), "functions": [{"name": "f"}]}
    conversation = parse_row(row, "x", messages="chat", tools="functions")
    assert conversation.turns == [1]
    assert conversation.tools == [{"name": "f"}]


def test_the_columns_asked_for_are_named_in_the_message() -> None:
    with pytest.raises(UserError, match=r"no 'chat' column \(found: messages\); name yours in data\.messages"):
        parse_row({"messages": [USER, ANSWER]}, "x", messages="chat")
    with pytest.raises(UserError, match="'functions' must be a list of tool schemas"):
        parse_row({"messages": [USER, ANSWER], "functions": 5}, "x", tools="functions")


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(UserError) as error:
        parse_row({"messages": ["x" * 5000]}, "rows.jsonl, line 3")
    assert len(str(error.value)) < 200

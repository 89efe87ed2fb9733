"""Claims: each shape becomes the messages that it means, and nothing of the row is lost; the shape is named, or is that
of the first row. Errors of bad rows are in test_bad_data.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from mtr.data.conversation import Conversation
from mtr.data.shapes import Reader
from mtr.errors import RowError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def read(row: dict[str, Any], **keys: Any) -> Conversation:
    """As `auto` does."""
    conversation = Reader(shape=None, **keys).with_shape_of([row]).read(row, "rows.jsonl, line 1")
    assert conversation.row is row
    return conversation


def messages(row: dict[str, Any], **keys: Any) -> list[dict[str, Any]]:
    return [dict(message.data) for message in read(row, **keys).messages]


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": [USER, ANSWER], "prompt": "x", "completion": "y"}, "messages"),
        ({"conversations": [USER, ANSWER]}, "messages"),
        ({"messages": json.dumps([USER, ANSWER])}, "messages"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "sharegpt"),
        ({"messages": [{"from": "human", "value": "x"}]}, "sharegpt"),
        ({"conversations": json.dumps([{"from": "human", "value": "x"}])}, "sharegpt"),
        ({"prompt": "x", "completion": "y"}, "prompt_completion"),
        ({"messages": None, "prompt": [USER], "completion": [ANSWER]}, "prompt_completion"),
        ({"instruction": "x", "output": "y"}, "instruction"),
        ({"text": "x"}, "messages"),
        ({}, "messages"),
    ],
)
def test_the_first_row_tells_the_shape(row: dict[str, Any], shape: str) -> None:
    assert Reader(shape=None).with_shape_of([row]).shape == shape
    assert Reader(shape=None).with_shape_of([RowError("x", "broken"), {"id": 1}, row, {"prompt": "", "completion": ""}])


def test_a_row_that_tells_nothing_is_passed_over_when_the_shape_is_looked_for() -> None:
    rows = [RowError("x", "not valid JSON"), [1], {"id": 1}, {"instruction": "x", "output": "y"}, {"messages": []}]
    assert Reader(shape=None).with_shape_of(rows).shape == "instruction"


def test_openai_messages_under_another_usual_name() -> None:
    assert messages({"conversations": [USER, ANSWER]}) == [USER, ANSWER]


def test_sharegpt() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '<think>hm</think>\n{"name": "f", "arguments": {"x": [1, null]}}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "A", "weight": 0.5, "reasoning_content": "R"},
            {"from": "user", "value": "Q2"},
            {"from": "function_call", "value": '[{"name": "f", "arguments": "{}"}, {"name": "g"}]'},
            {"from": "tool", "value": "43"},
            {"from": "assistant", "value": "A2"},
        ],
        "tools": json.dumps(TOOLS),
    }
    conversation = read(row)
    calls = [
        [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, None]}}}],
        [
            {"type": "function", "function": {"name": "f", "arguments": {}}},
            {"type": "function", "function": {"name": "g"}},
        ],
    ]
    assert [dict(message.data) for message in conversation.messages] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "<think>hm</think>", "tool_calls": calls[0]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "", "tool_calls": calls[1]},
        {"role": "tool", "content": "43"},
        {"role": "assistant", "content": "A2"},
    ]
    assert conversation.tools == TOOLS
    assert [conversation.messages[i].weight for i in conversation.turns] == [1, 0.5, 1, 1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "output": "Hello", "history": []},
    ],
)
def test_every_shape_says_the_same_and_may_have_its_system_prompt_and_tools_in_columns(row: dict[str, Any]) -> None:
    assert messages(row) == [USER, ANSWER]
    assert messages({**row, "system": ""}) == [USER, ANSWER]
    conversation = read({**row, "system": "S", "tools": TOOLS})
    assert [dict(message.data) for message in conversation.messages] == [
        {"role": "system", "content": "S"}, USER, ANSWER
    ]  # fmt: skip
    assert conversation.tools == TOOLS
    assert messages({**row, "system": "S"}, columns={"system": None}) == [USER, ANSWER]


def test_a_system_prompt_that_stands_twice_is_taken_once() -> None:
    row = {"messages": [{"role": "system", "content": "S"}, USER, ANSWER], "system": "S"}
    assert messages(row) == row["messages"]


def test_only_the_completion_is_trained() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER]}
    conversation = read(row)
    assert [conversation.messages[i].weight for i in conversation.turns] == [0, 1, 1]
    assert row["prompt"] == [USER, ANSWER, USER], "the row is left alone"


def test_a_prompt_that_looks_like_json_stays_text() -> None:
    row = {"prompt": "[1, 2, 3]", "completion": '{"role": "x"}'}
    assert [message["content"] for message in messages(row)] == ["[1, 2, 3]", '{"role": "x"}']


def test_lists_of_messages_may_be_json_text() -> None:
    assert messages({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}) == [USER, ANSWER]


def test_instruction_with_input_and_history() -> None:
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5", "history": [["Hi", "Hello"], ["a", "b"]]}
    texts = [(message["role"], message["content"]) for message in messages(row)]
    assert texts == [
        ("user", "Hi"), ("assistant", "Hello"), ("user", "a"), ("assistant", "b"),
        ("user", "Add.\n2 and 3"), ("assistant", "5"),
    ]  # fmt: skip


def test_columns_may_have_other_names() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    assert messages({"question": "Hi", "answer": "Hello"}, columns=columns) == [USER, ANSWER]
    spoken = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert messages({"dialogue": spoken}, columns={"conversations": "dialogue"}) == [USER, ANSWER]
    assert messages({"dialogue": spoken}, messages="dialogue") == [USER, ANSWER]

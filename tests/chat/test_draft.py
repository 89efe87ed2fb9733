"""Claims: a turn whose thinking, response, calls or stop token would be lost is refused with the reason; text that a
template leaves out without making the turn wrong is noted; spellings with the same meaning give the same turn.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import transformers
from support.paths import QUICKSTART
from support.rendering import ROWS, behaving, check_turns, parsed, renderer, tool_row
from support.rows import conversation_row
from support.templates import BEHAVIOURS, CALLS, CONTENT, LAST, call, template

from mtr.chat import trials
from mtr.chat.findings import Findings
from mtr.chat.loading import make_renderer

# --- refusals ---------------------------------------------------------------------------------------------------------


def reasons(chat_template: str, row: dict[str, Any], **keys: Any) -> list[str | None]:
    return [turn.reason for turn in renderer(chat_template, **keys).render(parsed(row))]


def test_closed_thinking_is_refused_by_its_switch() -> None:
    text = BEHAVIOURS["a switch closes it"].text
    switch = {"enable_thinking": False}
    refused = reasons(text, ROWS["thinking"], template=switch)
    assert all(reason and "template: {enable_thinking: true}" in reason for reason in refused)
    made, conversation = renderer(text, template=switch), parsed(ROWS["no thinking"])
    turns = made.render(conversation)
    check_turns(made, conversation, turns)
    assert made.tokenizer.decode(list(turns[0].prompt_ids)).endswith("</think>\n\n")
    assert "think>" not in made.tokenizer.decode(list(turns[0].completion_ids))
    assert reasons(text, ROWS["thinking"], template={"enable_thinking": True}) == [None] * 3


def test_the_switch_that_opens_is_found_by_trial() -> None:
    """Whatever its name and values are; if nothing opens the thinking, the reason states it."""
    text = BEHAVIOURS["closed, and a switch opens it"].text
    assert all(
        reason and 'open it with template: {deliberate: "yes"}' in reason for reason in reasons(text, ROWS["thinking"])
    )
    assert reasons(text, ROWS["thinking"], template={"deliberate": "yes"}) == [None] * 3
    text = BEHAVIOURS["closed for good"].text
    assert all(
        reason and "no argument of the template opens it" in reason for reason in reasons(text, ROWS["thinking"])
    )


def test_dropped_parallel_call_is_refused() -> None:
    first_call = CALLS.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
    first_only = template(LAST + CONTENT + first_call)
    two = tool_row(call("count", who="Ana"), call("look", who="Ben"))
    same = tool_row(call("count", who="Ana"), call("count", who="Ben"))
    for row in (two, same):
        made = renderer(first_only)
        turns = made.render(parsed(row))
        assert [turn.reason for turn in turns] == ["the template drops a parallel tool call", None, None]
        assert turns[1].notes == ("the template leaves out earlier parallel tool calls",)
        assert reasons(BEHAVIOURS["history thinking is stripped"].text, row) == [None] * 3
    assert reasons(first_only, ROWS["tools"]) == [None] * 3


def test_dropped_argument_is_refused() -> None:
    names_only = template(CONTENT + "{%- for c in message.tool_calls or [] -%}{{- c.function.name -}}{%- endfor -%}")
    assert "argument" in (reasons(names_only, ROWS["tools"])[0] or "")


def test_answer_cut_at_a_literal_tag_is_refused() -> None:
    row = conversation_row(1)
    row["messages"][1]["content"] = "The tag </think> ends it."
    (reason,) = reasons(BEHAVIOURS["an answer is cut at its closing tag"].text, row)
    assert reason is not None
    assert "response" in reason
    assert "</think>" in reason
    assert reasons(BEHAVIOURS["history thinking is stripped"].text, row) == [None]


def test_thinking_that_holds_its_own_closing_tag_is_refused() -> None:
    """Inference would end it there, and read the rest of it as the response."""
    row = conversation_row(1)
    row["messages"][1]["reasoning_content"] = "First </think> and then more."
    for name in ("history thinking is stripped", "never rendered, the prompt opens it"):
        assert "inference would end it there" in (reasons(BEHAVIOURS[name].text, row)[0] or "")


def test_thinking_in_two_places_is_refused_unless_it_is_the_same() -> None:
    row = conversation_row(1)
    answer = row["messages"][1]
    said, thought = answer["content"], answer["reasoning_content"]
    text = BEHAVIOURS["history thinking is stripped"].text
    answer["content"] = f"<think>\nAnother.\n</think>\n\n{said}"
    assert "two thinkings" in (reasons(text, row)[0] or "")
    answer["content"] = f"<think>\n{thought}\n</think>\n\n{said}"
    same, plain = (renderer(text).render(parsed(r)) for r in (row, conversation_row(1)))
    assert same[0].completion_ids == plain[0].completion_ids


def test_stop_token_in_the_answer_is_refused() -> None:
    """Inference would stop there."""
    row = conversation_row(1)
    row["messages"][1]["content"] = "It ends with <|im_end|>, always."
    assert "inference stops at <|im_end|>" in (reasons(BEHAVIOURS["history thinking is stripped"].text, row)[0] or "")


def test_thinking_without_any_tags_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*arguments: Any) -> Findings:
        return replace(trials.find(*arguments), tags=None, answers_read=(), calls_read=())

    monkeypatch.setattr("mtr.chat.loading.find", find)
    loaded = transformers.AutoTokenizer.from_pretrained(str(QUICKSTART / "base"))
    loaded.chat_template = BEHAVIOURS["the tags are named in the recipe"].text.replace("[/why]", "@")
    (turn,) = make_renderer(loaded).render(parsed(conversation_row(1)))
    assert "no think tags were found" in (turn.reason or "")


def test_template_that_refuses_is_quoted() -> None:
    strict = template("{{- raise_exception('tools are not for Ana') if message.tool_calls else message.content -}}")
    found = reasons(strict, ROWS["tools"])
    assert all(reason and "tools are not for Ana" in reason for reason in found[:2])


# --- what is left out is noted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assistant", "other", "notes"),
    [
        (CONTENT + CALLS, "{%- if message.role != 'system' -%}" + CONTENT + "{%- endif -%}", "system messages"),
        (CONTENT + CALLS, "{%- if message.role != 'tool' -%}" + CONTENT + "{%- endif -%}", "tool messages"),
        (CONTENT, CONTENT, "earlier tool calls"),
    ],
)
def test_left_out_of_the_history_is_noted(assistant: str, other: str, notes: str) -> None:
    made = renderer(template(assistant, other=other))
    assert made.render(parsed(ROWS["tools"]))[-1].notes == (f"the template leaves out {notes}",)
    assert renderer(template(CONTENT + CALLS)).render(parsed(ROWS["tools"]))[-1].notes == ()


def test_text_beside_a_call_is_noted() -> None:
    row = tool_row(call("count", who="Ana"))
    row["messages"][2]["content"] = "I shall ask."
    drops = template(LAST + "{%- if not message.tool_calls -%}" + CONTENT + "{%- endif -%}" + CALLS)
    assert renderer(drops).render(parsed(row))[0].notes == ("the template drops the text beside its tool calls",)
    assert behaving("history thinking is stripped").render(parsed(row))[0].notes == ()


def test_text_beside_a_call_as_thinking_is_noted() -> None:
    row = tool_row(call("count", who="Ana"))
    row["messages"][2] |= {"content": "I shall ask.", "reasoning_content": None}
    first, *_ = behaving("channels, with another end in history").render(parsed(row))
    assert first.trained
    assert first.notes == ("the template writes the text beside its tool calls as thinking",)


def test_schemas_left_out_are_noted() -> None:
    schema = {"type": "function", "function": {"name": "count", "parameters": {}}}
    name = "no generation prompt, and the system message only before the last user message"
    row = {"messages": ROWS["tools"]["messages"][1:], "tools": [schema]}
    assert all("tool schemas" in turn.notes[0] for turn in behaving(name).render(parsed(row)))


# --- details ----------------------------------------------------------------------------------------------------------


def test_string_arguments_equal_objects() -> None:
    objects = [call("count", who="Ana", where={"box": [1, 2.5, None, "ü"]})]
    strings = json.loads(json.dumps(objects))
    strings[0]["function"]["arguments"] = json.dumps(strings[0]["function"]["arguments"])
    assert isinstance(strings[0]["function"]["arguments"], str)
    for name in ("history thinking is kept", "tool arguments must be text"):
        made = behaving(name)
        turns = made.render(parsed(tool_row(*strings)))
        assert turns == made.render(parsed(tool_row(*objects)))
        assert all(turn.trained for turn in turns)


def test_white_space_around_a_response_is_no_reason_to_refuse() -> None:
    row = conversation_row(1)
    row["messages"][1]["content"] = "\n  Ana has 2 coins now. \n"
    for name in BEHAVIOURS:
        if BEHAVIOURS[name].thinks:
            (turn,) = behaving(name).render(parsed(row))
            assert turn.trained, (name, turn.reason)


def test_stop_token_is_the_generation_configs() -> None:
    """Where the template writes none: the one that history holds there, else what inference stops at first."""
    text = BEHAVIOURS["no end of turn after the last answer"].text
    for stop_ids, stop in (([0, 2], 2), ([0], 0)):
        made = renderer(text, stop_ids=stop_ids)
        assert [turn.completion_ids[-1] for turn in made.render(parsed(ROWS["thinking"]))] == [stop] * 3
    made = renderer(BEHAVIOURS["history thinking is stripped"].text, stop_ids=[0, 2])
    assert [turn.completion_ids[-1] for turn in made.render(parsed(ROWS["thinking"]))] == [2, 2, 2]

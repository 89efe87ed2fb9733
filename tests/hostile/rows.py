"""Rows of data: of the wrong type, damaged, contradictory, huge; skipped and counted where the recipe says so."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from support.hostile import Attempt, Check, Ended, Place, Prepare, command, done, json_lines, refused, stopped
from support.rows import ANSWER, USER, chat, conversation_row

CALL = {"id": "call_1", "type": "function", "function": {"name": "count", "arguments": {"who": "Ana"}}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "7"}


def answer(**keys: Any) -> dict[str, Any]:
    """A row whose answer has these keys."""
    return chat(USER, {"role": "assistant", **keys})


def given(*rows: Any, name: str = "train", **sections: Any) -> Prepare:
    """A command on these rows; two good ones come before them."""

    def prepare(place: Place) -> Sequence[object]:
        place.rows(conversation_row(), conversation_row(turns=1), *rows)
        return command(name, *(["--all"] if name == "inspect" else []), **sections)(place)

    return prepare


def bad(name: str, row: Any, *says: str, **keys: Any) -> Attempt:
    """One bad row, the third: refused with its file and line."""
    return refused(name, given(row, training={"conversations_per_step": 3}), "rows.jsonl, line 3", *says, **keys)


def skipped(name: str, row: Any, reason: str, **sections: Any) -> Attempt:
    """With `on_bad_row: skip` the row is counted by its reason, and the other two are trained."""

    def holds(place: Place, ended: Ended) -> None:
        rows = json_lines(ended)
        assert len(rows) == 3, f"{len(rows)} rows"
        assert reason in rows[2].get("skipped", ""), rows[2]
        assert all(row["turns"] for row in rows[:2])

    data = {"on_bad_row": "skip", **sections.pop("data", {})}
    return done(name, given(row, name="inspect", data=data, **sections), holds=holds)


def untrained(name: str, row: Any, reason: str, turn: int = 0, max_length: int = 4096, **keys: Any) -> Attempt:
    """The row is read, and a turn of it is not trained, with this reason."""

    def holds(place: Place, ended: Ended) -> None:
        found = json_lines(ended)[2]["turns"][turn]
        assert not found["trained"], "it is trained"
        assert reason in found["reason"], found["reason"]

    prepare = given(row, name="inspect", sequence={"max_length": max_length})
    return done(name, prepare, holds=holds, **keys)


def noted(name: str, row: Any, *words: str, **sections: Any) -> Attempt:
    """Three copies of the row are trained on, and the run counts them with these words."""

    def holds(place: Place, ended: Ended) -> None:
        counted = [line for line in ended.err.splitlines() if "note" in line and re.search(r"\b3\b", line)]
        assert any(all(word in line for word in words) for line in counted), f"nothing of {words} in {ended.err}"

    return done(name, given(row, row, row, **sections), holds=holds)


def kept(name: str, row: Any, holds: Check | None = None, **sections: Any) -> Attempt:
    """Odd, but right: every turn of the row is trained."""

    def all_trained(place: Place, ended: Ended) -> None:
        turns = json_lines(ended)[2]["turns"]
        assert turns
        assert all(turn["trained"] and turn["completion_ids"] for turn in turns), turns
        if holds:
            holds(place, ended)

    return done(name, given(row, name="inspect", **sections), holds=all_trained)


def counted(place: Place, ended: Ended) -> None:
    """A training run that skipped row 3 said so, and wrote it to rejects.jsonl."""
    rejects = [json.loads(line) for line in (place.run / "rejects.jsonl").read_text().splitlines()]
    assert [(r["row"], r["where"].rpartition(", ")[2]) for r in rejects] == [(2, "line 3")], rejects
    assert "1 row" in ended.err, "the run does not say so"


BAD = (
    bad("a list", [USER, ANSWER], "JSON object"),
    bad("a text", '"hello"', "JSON object"),
    bad("null", None, "JSON object"),
    bad("a number", 7, "JSON object"),
    bad("an empty object", {}, "'messages'"),
    bad("other columns", {"text": "hello"}, "'messages'", "text"),
    bad("a column in capitals", {"Messages": [USER, ANSWER]}, "'messages'", "Messages"),
    bad("messages are null", {"messages": None}, "'messages'"),
    bad("messages are text", {"messages": "hello"}, "'messages'"),
    bad("messages are an object", {"messages": USER}, "'messages'"),
    bad("no messages", {"messages": []}, "'messages'", "empty"),
    bad("messages are broken JSON text", {"messages": '[{"role": "user"'}, "'messages'"),
    bad("a message is text", chat("hello", ANSWER), "message 0"),
    bad("a message is null", chat(USER, None), "message 1"),
    bad("a message is a list", chat([USER], ANSWER), "message 0"),
    bad("an empty message", chat(USER, ANSWER, {}), "message 2", "role"),
    bad("a role that is none", chat({"role": "human", "content": "x"}, ANSWER), "message 0", "'human'"),
    bad("a role in capitals", chat({"role": "User", "content": "x"}, ANSWER), "message 0", "'User'"),
    bad("a role that is a number", chat({"role": 1, "content": "x"}, ANSWER), "message 0", "role"),
    bad("a role that is a list", chat({"role": ["user"], "content": "x"}, ANSWER), "message 0", "role"),
    bad("a role with escape codes", chat({"role": "\x1b[31muser", "content": "x"}, ANSWER), "unknown role"),
    bad("a role of 100,000 characters", chat({"role": "u" * 100_000, "content": "x"}, ANSWER), "unknown role"),
    bad("no answer", chat(USER), "no assistant message"),
    bad("only a system message", chat({"role": "system", "content": "x"}), "no assistant message"),
    bad("a user message without content", chat({"role": "user"}, ANSWER), "message 0", "content"),
    bad("an answer without content", answer(), "message 1", "content"),
    bad("content that is a number", answer(content=4), "message 1", "content"),
    bad("content that is true", answer(content=True), "message 1", "content"),
    bad("content that is an object", answer(content={"text": "x"}), "message 1", "content"),
    bad("content with an image", chat({"role": "user", "content": [{"type": "image"}]}, ANSWER), "message 0", "image"),
    bad("content of parts that are text", answer(content=["a", "b"]), "message 1", "content"),
    bad("a text part without text", answer(content=[{"type": "text"}]), "message 1", "content"),
    bad("a thinking part without thinking", answer(content=[{"type": "thinking"}]), "message 1", "thinking"),
    bad(
        "thinking after the text",
        answer(content=[{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}]),
        "message 1",
        "before the text",
    ),
    bad(
        "thinking twice",
        answer(content=[{"type": "thinking", "thinking": "a"}], reasoning_content="b"),
        "message 1",
        "thinking both",
    ),
    bad("thinking that is a list", answer(content="x", reasoning_content=["a"]), "message 1", "'reasoning_content'"),
    bad("half a surrogate pair", answer(content="\ud800"), "message 1", "not valid text"),
    bad("half a surrogate pair in the thinking", answer(content="x", reasoning_content="\udfff"), "message 1"),
    bad("half a surrogate pair in a tool's name", answer(tool_calls=[{"function": {"name": "\ud800"}}]), "message 1"),
    bad("a weight below 0", answer(content="x", weight=-1), "message 1", "'weight'"),
    bad(
        "a weight that is no number",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": NaN}]}',
        "message 1",
        "'weight'",
    ),
    bad(
        "a weight that is infinite",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1e999}]}',
        "message 1",
        "'weight'",
    ),
    bad("a weight in words", answer(content="x", train="yes"), "message 1", "'train'"),
    bad("calls that are no list", answer(tool_calls={"name": "count"}), "message 1", "tool_calls"),
    bad("a call without a name", answer(tool_calls=[{"function": {"arguments": {}}}]), "message 1", "tool call"),
    bad("a call that is null", answer(tool_calls=[None]), "message 1", "tool call"),
    bad("a call whose name is a number", answer(tool_calls=[{"function": {"name": 7}}]), "message 1", "tool call"),
    bad(
        "arguments that are broken JSON",
        answer(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        "message 1",
        "'f'",
    ),
    bad(
        "arguments nested without end",
        answer(tool_calls=[{"function": {"name": "f", "arguments": "[" * 100_000}}]),
        "message 1",
        "'f'",
    ),
    bad("tools that are text", {**conversation_row(), "tools": "a hammer"}, "'tools'"),
    bad("tools that are numbers", {**conversation_row(), "tools": [1, 2]}, "'tools'"),
    bad("a line that is no JSON", "{broken", "not valid JSON"),
    bad("a line in Python's spelling", "{'messages': None}", "not valid JSON"),
    bad("a line with a comma too many", '{"messages": [],}', "not valid JSON"),
    bad("two rows on a line", json.dumps(conversation_row()) * 2, "not valid JSON"),
    bad("a comment", "// not a row", "not valid JSON"),
    bad("a line that ends early", json.dumps(conversation_row())[:-9], "not valid JSON"),
    bad("a line of 100,000 brackets", "[" * 100_000, "nested too deeply"),
    bad("objects in each other without end", '{"messages": ' * 50_000, "nested too deeply"),
    bad("a number of 5,000 digits", f'{{"messages": {"9" * 5000}}}', "not valid JSON"),
    bad("escape codes in a key", '{"\\u001b[2J": 1}', "'messages'"),
    bad("a key that reorders what is read", '{"\\u202e]}": 1}', "'messages'"),
    bad("10,000 columns", {f"column{i}": i for i in range(10_000)}, "'messages'"),
    bad("a ShareGPT message among others", chat(USER, {"from": "gpt", "value": "x"}), "ShareGPT"),
    bad("another format than before", {"prompt": "a", "completion": "b"}, "'messages'", "prompt, completion"),
)


def alone(name: str, row: Any, *says: str, **data: Any) -> Attempt:
    """A file of this one row."""

    def prepare(place: Place) -> Sequence[object]:
        place.rows(row)
        return command("train", data=data)(place)

    return refused(name, prepare, "rows.jsonl, line 1", *says)


FORMATS = (
    alone("ShareGPT: a speaker that is none", {"conversations": [{"from": "robot", "value": "x"}]}, "'robot'"),
    alone("ShareGPT: no value", {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "message 0"),
    alone(
        "ShareGPT: a call that is no JSON",
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "count()"}]},
        "message 1",
        "function_call",
    ),
    alone("ShareGPT: asked for, and not there", {"text": "x"}, "'conversations'", format="sharegpt"),
    alone("prompt: the completion is a number", {"prompt": "a", "completion": 7}, "'completion'"),
    alone("prompt: no completion", {"prompt": "a"}, "'completion'", format="prompt_completion"),
    alone("prompt: lists of texts", {"prompt": ["a"], "completion": ["b"]}, "'prompt'"),
    alone(
        "prompt: two system prompts",
        {"system": "x", "prompt": [{"role": "system", "content": "y"}, USER], "completion": "b"},
        "two system prompts",
    ),
    alone("prompt: the prompt's answer and no other", {"prompt": "a", "completion": [USER]}, "no assistant message"),
    alone("instruction: a history of texts", {"instruction": "a", "output": "b", "history": ["x"]}, "'history'"),
    alone("instruction: an input that is a number", {"instruction": "a", "input": 7, "output": "b"}, "'input'"),
    alone(
        "instruction: an output that is null", {"instruction": "a", "output": None}, "'output'", format="instruction"
    ),
    alone("a column named that is not there", {"messages": [USER, ANSWER]}, "'chat'", messages="chat"),
    alone("a column named that is no list", {"messages": [USER, ANSWER], "id": 7}, "'id'", messages="id"),
)

COUNTED = (
    skipped("skipped: broken JSON", "{broken", "not valid JSON"),
    skipped("skipped: no messages", {"text": "x"}, "'messages'"),
    skipped("skipped: half a surrogate pair", answer(content="\ud800"), "not valid text"),
    skipped("skipped: an unknown role", chat({"role": "human", "content": "x"}, ANSWER), "unknown role"),
    skipped(
        "skipped: too many messages", conversation_row(turns=9), "more messages", data={"filter": {"max_messages": 8}}
    ),
    done("skipped in training, and counted", given("{broken", data={"on_bad_row": "skip"}), holds=counted),
    stopped(
        "a bad row of the third step, after two that are saved",
        given(conversation_row(), conversation_row(), "{broken"),
        "rows.jsonl, line 5",
        "not valid JSON",
    ),
    untrained("not trained: weight 0", answer(content="x", weight=0), "weight 0"),
    untrained("not trained: a greeting first", chat(ANSWER, USER, ANSWER), "no message comes before it"),
    untrained(
        "not trained: longer than max_length",
        conversation_row(turns=9),
        "max_length (120)",
        turn=8,
        max_length=120,
    ),
    untrained("not trained: calls that the template leaves out", answer(content="", tool_calls=[CALL]), "tool call"),
    untrained("not trained: an answer with an end token in it", answer(content="a<|im_end|>b"), ""),
    noted("an empty answer", answer(content=""), "empty"),
    noted("an answer of white space", answer(content=" \n"), "empty"),
    noted(
        "a key that is there twice",
        '{"messages": [], "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "given twice",
    ),
    noted(
        "a role that is there twice",
        '{"messages": [{"role": "user", "role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "given twice",
    ),
    noted(
        "a content that is there twice",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}',
        "given twice",
    ),
    noted(
        "a result of a call that nobody made",
        chat(USER, {"role": "assistant", "content": "x"}, RESULT, ANSWER),
        "answers no call",
    ),
    noted(
        "results in another order",
        chat(
            USER,
            {"role": "assistant", "content": "x", "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
            {**RESULT, "tool_call_id": "call_2"},
            RESULT,
            ANSWER,
        ),
        "order",
    ),
    kept("text parts", answer(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
    kept("messages as JSON text", {"messages": json.dumps([USER, ANSWER])}),
    kept("line separators of Unicode in a text", answer(content="a\u2028b\u2029c\x85d")),
    kept("control characters in a text", answer(content="\x1b[31m\x00\x07")),
    kept("an answer of a thousand emoji", answer(content="👩‍👩‍👧" * 100)),
    kept("a message with keys of its own", answer(content="x", id=7, annotations=None, extra={"deep": [1]})),
    kept("a conversation that ends with a question", chat(USER, ANSWER, USER)),
    kept("weights that add up", answer(content="x", weight=0.5, loss=2)),
)

LONG = (
    untrained(
        "not trained: an answer of 50 MB",
        chat(USER, {"role": "assistant", "content": "word " * 10_000_000}),
        "max_length (4096)",
        seconds=20,
        slow=True,
    ),
    bad("a line of 100 MB", chat(USER, {"role": "assistant", "content": "word " * 20_000_000}), "64 MiB", slow=True),
    Attempt(
        "audit: a conversation of 2,000 turns",
        given(conversation_row(turns=2_000), name="audit"),
        ("max_length (4096)",),
        codes=(1,),
        seconds=60,
        slow=True,
    ),
)

ATTEMPTS = (*BAD, *FORMATS, *COUNTED, *LONG)

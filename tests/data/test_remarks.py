"""Claims: what is odd about a row that is trained all the same is counted, told before the first step, at the end and
in an audit, and never said of a row that is right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import conversation_row
from support.sources import opened

from mtr.prepare.counts import Counts
from mtr.training.state import RunState

EMPTY_ANSWER = "an assistant message is empty: no text, no thinking, no call"
NO_CALL = "a tool result answers no call before it"
NO_RESULT = "the chat goes on after a tool call that has no result"
OUT_OF_ORDER = "tool results are in another order than their calls"
REPEATED_KEY = "a key is given twice in one object, and only the last value counts"
USER = {"role": "user", "content": "Ana has 4 coins."}
ANSWER = {"role": "assistant", "content": "Ana has 4 coins now."}


def calls(*ids: str | None) -> dict[str, Any]:
    """A message of calls; None: one without id."""
    made = [{"type": "function", "function": {"name": "f", "arguments": {}}} for _ in ids]
    return {"role": "assistant", "tool_calls": [{**c, "id": i} if i else c for c, i in zip(made, ids, strict=True)]}


def result(known: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": "7", **({"tool_call_id": known} if known else {})}


def said(tmp_path: Path, *messages: dict[str, Any]) -> tuple[str, ...]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, *messages]}))
    return opened(path).conversation(0).remarks


RIGHT: dict[str, list[dict[str, Any]]] = {
    "an answer": [ANSWER],
    "thinking alone": [{"role": "assistant", "content": "", "reasoning_content": "Hm."}],
    "thinking in a part": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}]}],
    "a call without text": [{**calls("a"), "content": ""}],
    "an empty answer that is context": [{"role": "assistant", "content": "", "train": False}, USER, ANSWER],
    "a call at the end": [calls("a")],
    "two rounds": [calls("a", "b"), result("a"), result("b"), calls("a"), result("a"), ANSWER],
    "two rounds without ids": [calls(None, None), result(), result(), calls(None), result(), ANSWER],
    "ids of the calls alone": [calls("a", "b"), result(), result(), ANSWER],
    "ids of the results alone": [calls(None, None), result("a"), result("b"), ANSWER],
    "one result for several calls": [calls(None, None), result(), ANSWER],
    "calls of one turn in several messages": [calls("a"), calls("b"), result("a"), result("b"), ANSWER],
    "some results at the end": [calls("a", "b"), result("a")],
}
ODD: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "an empty answer": ([{"role": "assistant", "content": ""}], [EMPTY_ANSWER]),
    "white space": ([{"role": "assistant", "content": " \n\t", "reasoning_content": " "}], [EMPTY_ANSWER]),
    "empty parts": ([{"role": "assistant", "content": [{"type": "text", "text": ""}]}], [EMPTY_ANSWER]),
    "no calls": ([{"role": "assistant", "content": "", "tool_calls": []}], [EMPTY_ANSWER]),
    "another id": ([calls("a"), result("b"), ANSWER], [NO_CALL, NO_RESULT]),
    "an answer to nothing": ([result(), ANSWER], [NO_CALL]),
    "an answer twice": ([calls("a"), result("a"), result("a"), ANSWER], [NO_CALL]),
    "more results than calls": ([calls(None), result(), result(), ANSWER], [NO_CALL]),
    "an answer to an earlier round": ([calls("a"), result("a"), ANSWER, USER, result("a"), ANSWER], [NO_CALL]),
    "no result": ([calls("a"), USER, ANSWER], [NO_RESULT]),
    "one of two results": ([calls("a", "b"), result("a"), ANSWER], [NO_RESULT]),
    "no result before the next call": ([calls("a", "b"), result("b"), calls("c")], [OUT_OF_ORDER, NO_RESULT]),
    "out of order": ([calls("a", "b"), result("b"), result("a"), ANSWER], [OUT_OF_ORDER]),
    "several": (
        [{"role": "assistant", "content": ""}, USER, {"role": "assistant", "content": ""}, result("a"), result("b")],
        [EMPTY_ANSWER, NO_CALL],
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_said_of_what_is_right(tmp_path: Path, name: str) -> None:
    assert said(tmp_path, *RIGHT[name]) == ()


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_said_once(tmp_path: Path, name: str) -> None:
    messages, remarks = ODD[name]
    assert said(tmp_path, *messages) == tuple(remarks)


GOOD_LINE = json.dumps({"messages": [USER, ANSWER]})
REPEATED = {
    "a column": GOOD_LINE[:-1] + ', "id": 1, "id": 2}',
    "a column twice the same": GOOD_LINE[:-1] + ', "id": 1, "id": 1}',
    "a key of a message": GOOD_LINE.replace('"role": "user"', '"role": "user", "name": "x", "name": "y"'),
    "deep inside": GOOD_LINE[:-1] + ', "meta": [[{"a": {"b": 1, "b": 2}}]]}',
    "tool arguments in JSON text": json.dumps(
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}]}
    ),
    "messages in JSON text": json.dumps({"messages": '[{"role": "user", "role": "user", "content": "x"}, %s]'})
    % json.dumps(json.dumps(ANSWER))[1:-1],
}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("array", [False, True])
def test_a_key_given_twice_is_said(tmp_path: Path, name: str, array: bool) -> None:
    path = tmp_path / ("rows.json" if array else "rows.jsonl")
    lines = [GOOD_LINE, REPEATED[name], GOOD_LINE]
    path.write_text(f"[{', '.join(lines)}]" if array else "\n".join(lines))
    data = opened(path)
    remarks = [data.conversation(i).remarks for i in range(3)]
    assert remarks == [(), (REPEATED_KEY,), ()]
    assert data.conversation(1).row == json.loads(REPEATED[name]), "the last value counts, as it always did"


def test_the_same_key_in_two_objects_is_right(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "a": [{"id": 1}, {"id": 2}], ' + GOOD_LINE[1:])
    assert opened(tmp_path / "rows.jsonl").conversation(0).remarks == ()


def test_rows_are_counted_by_remark_and_the_run_and_an_audit_say_so(
    mtr: Any, tmp_path: Path, write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    empty = {"messages": [USER, {"role": "assistant", "content": ""}]}
    asked = {"role": "user", "content": "And now?"}
    rows = [conversation_row(turns=1), empty, {"messages": [USER, result("a"), ANSWER]}, {"messages": [asked, ANSWER]}]
    rows.append({"messages": [asked, *empty["messages"][1:]]})
    recipe = write_recipe(
        data={"train": str(write_rows(rows))}, training={"max_steps": 2, "conversations_per_step": len(rows)}
    )
    code, _, err = mtr("train", recipe)
    assert code == 0
    assert f"note          2 of the first 5 rows: {EMPTY_ANSWER}" in err
    assert f"note          4 rows: {EMPTY_ANSWER}" in err, "two epochs"
    assert f"note          2 rows: {NO_CALL}" in err
    code, out, _ = mtr("audit", recipe, "--json")
    assert json.loads(out)["data"]["remarks"] == {EMPTY_ANSWER: 2, NO_CALL: 1}


def test_a_checkpoint_of_before_there_were_remarks_is_continued(tmp_path: Path) -> None:
    saved = RunState(tmp_path).to_json()
    saved["counts"] = {key: value for key, value in vars(Counts()).items() if key != "remarks"}
    state = RunState(tmp_path)
    state.restore(json.loads(json.dumps(saved)))
    assert state.counts.remarks == {}

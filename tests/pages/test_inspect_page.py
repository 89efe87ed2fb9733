"""Claims: the page holds the layout whole, in little room, with rows that are not trained and why; its heading numbers
are those of the inspection.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.inspections import inspected, long_conversation, part_trained, tokenizer
from support.rows import conversation_row

from mtr.data.conversation import SkippedRow
from mtr.pages.inspect import Row, inspect_page, runs, write_inspect_page


def embedded(*rows: Row) -> dict[str, Any]:
    """The data of the page of these rows."""
    found = re.search(r'id="data">(.*?)</script>', inspect_page(rows, tokenizer()))
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def unrun(values: list[int], step: int = 0) -> list[int]:
    return [first + i * step for first, length in zip(values[::2], values[1::2], strict=True) for i in range(length)]


@given(st.lists(st.integers(-2, 2)), st.sampled_from([0, 1]))
def test_runs_hold_every_value(values: list[int], step: int) -> None:
    assert unrun([int(x) for x in runs(np.array(values, np.int64), step)], step) == values


def test_it_holds_the_layout() -> None:
    inspection, roles = inspected([conversation_row(4)])[0]
    layout = inspection.layouts[0]
    data = embedded((inspection, roles))
    tree, ids = data["rows"][0]["trees"][0], data["tokens"]["ids"]
    assert [ids[number] for number in tree["ids"]] == layout.input_ids.tolist()
    assert unrun(tree["end"]) == layout.subtree_end.tolist()
    assert unrun(tree["position"], 1) == layout.position_ids.tolist()
    assert unrun(tree["parent"], 1) == layout.parent.tolist()
    assert unrun(tree["role"]) == roles[0].role.tolist()
    targets = (tree["predictor"], [ids[number] for number in tree["target"]], unrun(tree["weight"]))
    assert targets == (layout.predictor.tolist(), layout.target_id.tolist(), layout.weight.tolist())
    assert data["rows"][0]["num_tokens"] == inspection.num_tokens
    leaves = {view.turn: leaf for leaf, view in layout.leaves}
    assert {turn["turn"]: turn["leaf"] for turn in data["rows"][0]["turns"]} == leaves


def test_what_is_not_trained_has_its_reason() -> None:
    part = inspected([part_trained()])[0]
    data = embedded(part, SkippedRow(7, "/data/rows.jsonl, line 8", "no messages", "no 'messages' column\x1b"))
    turn, skipped = data["rows"][0]["turns"][0], data["rows"][1]
    assert turn["reason"] == "the message says so (weight 0)"
    assert "leaf" not in turn
    assert (turn["text"], turn["shown"], turn["completion"]) == ("", 0, 0)
    assert skipped == {"index": 7, "where": "/data/rows.jsonl, line 8", "skipped": r"no 'messages' column\x1b"}


def test_a_turn_that_is_too_long_has_its_text() -> None:
    turn = embedded(*inspected([conversation_row(1)], "sequence.max_length=30"))["rows"][0]["turns"][0]
    assert turn["reason"] == "longer than sequence.max_length (30)"
    assert turn["text"].startswith("<think>")
    assert turn["text"].endswith("<|im_end|>")
    assert turn["shown"] == turn["completion"] > 0


def test_the_file_is_small_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    for row in (inspected([conversation_row()])[0], long_conversation()):
        write_inspect_page(path, [row], tokenizer())
    assert long_conversation()[0].num_tokens["single_pass"] > 20_000
    assert str(long_conversation()[0].num_tokens["single_pass"]) in path.read_text()
    assert path.stat().st_size < 1_000_000

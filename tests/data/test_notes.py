"""Claims: rows that repeat each other are noticed, and only these; the shape of a source is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.rows import conversation_row
from support.sources import ROWS, taken_from

from mtr.data.notes import count_repeating, describe_data
from mtr.data.shapes import Reader


def split_per_turn(row: dict[str, Any], thinking_in_history: bool) -> list[dict[str, Any]]:
    rows = []
    for end in range(2, len(row["messages"]) + 1, 2):
        history = row["messages"][: end - 1]
        if not thinking_in_history:
            history = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in history]
        rows.append({"messages": [*history, row["messages"][end - 1]]})
    return rows


@pytest.mark.parametrize("thinking_in_history", [True, False])
def test_data_split_per_turn_is_noticed(tmp_path: Path, thinking_in_history: bool) -> None:
    rows = [
        conversation_row(turns=2),
        *split_per_turn({"messages": conversation_row(4)["messages"][2:]}, thinking_in_history),
    ]
    path = tmp_path / "rows.jsonl"
    data, _ = taken_from(*rows, path=path)
    (note,) = describe_data(data)
    assert note.startswith(
        "2 of the first 4 rows are the beginning of another row or equal to one: the data is already split"
    )


def test_rows_that_are_there_twice_are_noticed(tmp_path: Path) -> None:
    data, _ = taken_from(ROWS[0], ROWS[1], ROWS[0], path=tmp_path / "rows.jsonl")
    (note,) = describe_data(data)
    assert note.startswith("1 of the first 3 rows")


def test_samples_and_completions_are_not_taken_for_split_data() -> None:
    def asked(thinking: str, answer: str) -> dict[str, Any]:
        said = {"role": "assistant", "content": answer, "reasoning_content": thinking}
        return {"messages": [{"role": "user", "content": "q"}, said]}

    samples = [asked("a", "4"), asked("b", "4"), asked("c", "5")]
    prompts = [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for row in split_per_turn(conversation_row(turns=4), True)
    ]
    assert count_repeating([Reader().read(row, "x") for row in samples]) == 0
    assert count_repeating([Reader("prompt_completion").read(row, "x") for row in prompts]) == 0


def test_the_shape_of_a_source_is_said(tmp_path: Path) -> None:
    data, _ = taken_from({"prompt": "a", "completion": "b"}, path=tmp_path / "rows.jsonl")
    assert describe_data(data) == [f"{tmp_path / 'rows.jsonl'} is read as prompt_completion"]

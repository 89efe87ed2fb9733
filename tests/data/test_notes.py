"""Claims: rows that repeat each other are noticed, and only these; the shape of a source is reported, and what is odd
in its rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.rows import conversation_row
from support.sources import ROWS, taken_from

from mtr.data.notes import describe_data


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
    assert note.startswith("2 of the first 4 rows are the beginning of another row: the data is already split per turn")


def test_rows_that_are_there_twice_are_noticed(tmp_path: Path) -> None:
    data, _ = taken_from(ROWS[0], ROWS[1], ROWS[0], path=tmp_path / "rows.jsonl")
    (note,) = describe_data(data)
    assert note.startswith("1 of the first 3 rows are equal to an earlier one: ")


def asked(*texts: str, **keys: Any) -> dict[str, Any]:
    """A chat of these texts, the user's first; the last answer with other keys."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [*messages[:-1], {**messages[-1], **keys}]}


def notes_on(tmp_path: Path, *rows: Any) -> list[str]:
    return describe_data(taken_from(*rows, path=tmp_path / "rows.jsonl")[0])


def test_samples_and_completions_are_not_taken_for_split_data(tmp_path: Path) -> None:
    samples = [asked("q", answer, reasoning_content=thinking) for thinking, answer in ("a4", "b4", "c5")]
    assert notes_on(tmp_path, *samples) == []
    prompts = [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for row in split_per_turn(conversation_row(turns=4), True)
    ]
    (shape,) = notes_on(tmp_path, *prompts)
    assert shape.endswith("is read as prompt_completion")


GREETING = ("Hi", "Hello! How can I help?")
TOPICS = [(f"Tell me about {name}.", f"{name} is a word.") for name in ("ants", "bees", "cows", "dogs", "eels")]


@pytest.mark.parametrize(
    ("rows", "equal"),
    [
        ([asked(*GREETING)] * 3 + [asked(*GREETING, *topic) for topic in TOPICS], 2),
        ([asked(*GREETING), *(asked(*GREETING, *topic) for topic in TOPICS)], 0),
        ([asked(*GREETING), asked(*GREETING, *TOPICS[0]), *(asked(*GREETING, *t, *TOPICS[0]) for t in TOPICS[1:])], 0),
        ([asked(*GREETING), asked(*GREETING, *TOPICS[0]), *(asked(f"q {i}", "a") for i in range(40))], 0),
    ],
    ids=["greetings alone and continued", "a greeting", "of several lengths", "a pair among many"],
)
def test_short_chats_that_begin_alike_are_not_taken_for_split_data(tmp_path: Path, rows: list[Any], equal: int) -> None:
    notes = notes_on(tmp_path, *rows)
    assert len(notes) == bool(equal)
    assert not equal or notes[0].startswith(f"{equal} of the first {len(rows)} rows are equal to an earlier one")


def test_split_chats_that_begin_alike_are_noticed(tmp_path: Path) -> None:
    chats = [asked(*GREETING, *topic, *TOPICS[0]) for topic in TOPICS[1:]]
    notes = notes_on(tmp_path, *(row for chat in chats for row in split_per_turn(chat, True)))
    assert [note[:50] for note in notes] == [
        "3 of the first 12 rows are equal to an earlier one",
        "4 of the first 12 rows are the beginning of anothe",
    ]


def test_what_is_odd_in_the_first_rows_is_said(tmp_path: Path) -> None:
    assert notes_on(tmp_path, asked("q", ""), asked("r", " \n"), asked("s", "a")) == [
        "2 of the first 3 rows: an assistant message is empty: no text, no thinking, no call"
    ]


def test_the_shape_of_a_source_is_said(tmp_path: Path) -> None:
    data, _ = taken_from({"prompt": "a", "completion": "b"}, path=tmp_path / "rows.jsonl")
    assert describe_data(data) == [f"{tmp_path / 'rows.jsonl'} is read as prompt_completion"]

"""Numbered rows in files and streams, and data that is opened from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.mixture import Mixture
from mtr.data.opening import open_data
from mtr.errors import UserError
from mtr.recipe.sections import DataSection


def numbered(number: int) -> dict[str, Any]:
    """A row that differs from all others."""
    answer = {"role": "assistant", "content": f"answer {number}"}
    return {"id": number, "messages": [{"role": "user", "content": f"question {number}"}, answer]}


ROWS = [numbered(number) for number in range(3)]


LINES = [json.dumps(row) for row in ROWS]


def opened(*sources: str | Path | dict[str, Any], **keys: Any) -> Mixture:
    given = [source if isinstance(source, dict) else str(source) for source in sources]
    section = DataSection.model_validate({"train": given, **keys})
    data = open_data(section, section.train)
    assert isinstance(data, Mixture)
    return data


def answers(data: Mixture) -> list[str]:
    return [data.conversation(i).messages[-1].content for i in range(len(data))]


def refused(*sources: str | Path | dict[str, Any], **keys: Any) -> str:
    with pytest.raises(UserError) as error:
        opened(*sources, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def generate(start: int, count: int) -> Iterator[dict[str, Any]]:
    for number in range(start, start + count):
        yield numbered(number)


def taken_from(*rows: Any, path: Path, **keys: Any) -> tuple[Mixture, list[Conversation | SkippedRow]]:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    data = opened(path, **keys)
    return data, [data.take(i) for i in range(len(data))]


def many(tmp_path: Path, count: int = 100, group: int = 1) -> Path:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({**numbered(i), "question": i // group}) + "\n" for i in range(count)))
    return path

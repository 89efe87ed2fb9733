"""Claims: a bad row is an error or is skipped with its reason; rows outside the limits are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.rows import conversation_row
from support.sources import ROWS, taken_from

from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.json_text import hash_value
from mtr.errors import UserError

BAD = {"messages": [{"role": "bot", "content": "x"}]}


def test_a_bad_row_is_an_error_or_passed_over_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = (ROWS[0], BAD, "{broken\n", ROWS[1])
    with pytest.raises(UserError, match="line 2, message 0: unknown role 'bot'"):
        taken_from(*rows, path=path)
    data, (first, role, broken, last) = taken_from(*rows, path=path, on_bad_row="skip")
    assert isinstance(first, Conversation)
    assert isinstance(last, Conversation)
    roles = "roles are system, developer, user, assistant, tool"
    assert role == SkippedRow(
        1, f"{path}, line 2", "unknown role", f"message 0: unknown role 'bot'; {roles}", hash_value(BAD)
    )
    assert isinstance(broken, SkippedRow)
    assert (broken.row, broken.where, broken.reason) == (2, f"{path}, line 3", "not valid JSON")
    assert broken.problem
    assert broken.problem.startswith("not valid JSON: Expecting")
    assert [c.where for c in data.first(5)] == [f"{path}, line 1", f"{path}, line 4"]
    with pytest.raises(UserError, match="unknown role"):
        data.conversation(1)


def test_rows_outside_the_limits_are_passed_over(tmp_path: Path) -> None:
    rows = [conversation_row(turns=turns) for turns in (1, 2, 3, 4)]
    limits = {"min_turns": 2, "max_messages": 6}
    data, taken = taken_from(*rows, path=tmp_path / "rows.jsonl", filter=limits)
    assert [isinstance(row, Conversation) for row in taken] == [False, True, True, False]
    reasons = [row.reason for row in taken if isinstance(row, SkippedRow)]
    assert reasons == ["fewer turns than data.filter.min_turns (2)", "more messages than data.filter.max_messages (6)"]
    assert all(row.problem is None for row in taken if isinstance(row, SkippedRow))
    assert len(data.conversation(0).turns) == 1, "a row asked for by its number is shown"

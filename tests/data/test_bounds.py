"""Claims: a row, a file or an archive of any size is answered within bounded memory, and named.

Limits are lowered where the real one would make a slow test; the texts name the real ones.
"""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.sources import LINES, numbered, opened, refused

from mtr.data.conversation import Conversation, SkippedRow

ANSWER = {"role": "assistant", "content": "a"}


def middle(tmp_path: Path, line: str) -> Any:
    """What becomes of a line between two good ones, where bad rows are skipped."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINES[0]}\n{line}\n{LINES[1]}\n")
    data = opened(path, on_bad_row="skip")
    first, taken, last = (data.take(i) for i in range(3))
    assert isinstance(first, Conversation)
    assert isinstance(last, Conversation)
    return taken


def test_a_long_row_is_a_bad_row(tmp_path: Path) -> None:
    taken = middle(tmp_path, json.dumps({"messages": [ANSWER], "x": "y" * (70 << 20)}))
    assert isinstance(taken, SkippedRow)
    assert taken.problem == "longer than 64 MiB; split or remove the row"


def test_a_row_of_many_objects_is_a_bad_row(tmp_path: Path) -> None:
    taken = middle(tmp_path, '{"messages": [' + "[]," * 2_000_000 + "[]]}")
    assert isinstance(taken, SkippedRow)
    assert taken.problem == "more than 2,000,000 lists and objects; split or remove the row"


def test_a_row_of_many_messages_is_a_bad_row(tmp_path: Path) -> None:
    taken = middle(tmp_path, '{"messages": [' + ", ".join([json.dumps(ANSWER)] * 100_001) + "]}")
    assert isinstance(taken, SkippedRow)
    assert taken.problem == "more than 100,000 messages (100,001); split or remove the row"


@pytest.mark.parametrize("depth", [100, 201, 900, 100_000])
@pytest.mark.parametrize("inside", ["row", "arguments", "messages"])
def test_deep_nesting_is_a_bad_row(tmp_path: Path, depth: int, inside: str) -> None:
    """As deep as later code can follow, it is allowed."""
    deep = "[" * depth + "]" * depth
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": deep}]}
    row = {
        "row": json.dumps({"messages": [ANSWER], "x": "DEEP"}).replace('"DEEP"', deep),
        "arguments": json.dumps({"messages": [call]}),
        "messages": json.dumps({"messages": f'[{json.dumps(ANSWER)[:-1]}, "x": {deep}' + "}]"}),
    }[inside]
    taken = middle(tmp_path, row)
    assert isinstance(taken, Conversation if depth == 100 else SkippedRow)
    if isinstance(taken, SkippedRow) and inside != "messages":
        assert "nested too deeply" in str(taken.problem)


@pytest.mark.parametrize("key", ["x" * 10_000_000, "two\nlines", "\x1b[31m"])
def test_names_in_errors_are_short_and_on_one_line(tmp_path: Path, key: str) -> None:
    for row in ({key: 1}, {f"{key}{i}": i for i in range(1 if len(key) > 99 else 100)}, {"messages": {key: 1}}):
        taken = middle(tmp_path, json.dumps(row))
        assert isinstance(taken, SkippedRow)
        assert len(str(taken.problem)) < 3000
        assert str(taken.problem).isprintable()


def test_a_csv_cell_is_bounded_and_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"instruction,output\na,b\n" + b"x" * (66 << 20) + b",y\n")
    assert refused(path) == f"{path}, line 3: longer than 64 MiB; split or remove the row"
    path.write_bytes(b'instruction,output\na,b\n"' + (b"x" * 1023 + b"\n") * (66 << 10) + b'",y\n')
    assert refused(path).startswith(f"{path}: cannot be read: field larger than field limit")


@pytest.mark.parametrize(("name", "start"), [("rows.jsonl.gz", b""), ("rows.csv.gz", b"a,b\n"), ("rows.json.gz", b"[")])
def test_an_archive_that_expands_without_end_is_given_up(
    tmp_path: Path, name: str, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 MB of zeros in 0.4 MB; limits are lowered by 16."""
    for limit, value in {
        "lines.MOST_ROW": 1 << 22,
        "lines.MOST_LEFT_OUT": 1 << 24,
        "tables.MOST_ROW": 1 << 22,
        "tables._SMALL": 1 << 24,
    }.items():
        monkeypatch.setattr(f"mtr.data.{limit}", value)
    block = gzip.compress(bytes(1 << 22))
    (tmp_path / name).write_bytes(gzip.compress(start) + block * 100)
    tracemalloc.start()
    text = refused(tmp_path / name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "longer than" in text or "times larger than the file" in text
    assert peak < 150 << 20


def test_what_does_not_fit_into_memory_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtr.data.tables.memory", lambda: 1000)
    (tmp_path / "rows.json").write_text(json.dumps([numbered(i) for i in range(50)]))
    (tmp_path / "rows.csv").write_text("instruction,output\n" + "a,b\n" * 500)
    table = pyarrow.Table.from_pylist([numbered(i) for i in range(50)])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.csv", "rows.parquet"):
        text = refused(tmp_path / name)
        assert text.startswith(f"{tmp_path / name}: ")
        assert text.endswith("write it as JSON lines (one row a line), which are read row by row")

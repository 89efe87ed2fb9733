"""Claims: a row of JSON lines is read as it was when the file was opened, or the run ends and keeps what it did; lines
of any length and number are found in one pass, in bounded memory.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.rows import conversation_row
from support.sources import LINES, ROWS, answers, numbered, opened

from mtr.errors import RowError, UserError
from mtr.recipe.loading import load_recipe
from mtr.training.loop import train


def text_of(*numbers: int) -> str:
    return "".join(json.dumps(numbered(number)) + "\n" for number in numbers)


def overwrite(path: Path, text: str) -> None:
    """Written into the same file, with the same time of modification: only the content tells."""
    status = path.stat()
    with path.open("r+") as file:
        file.write(text)
        file.truncate()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], None]] = {
    "reordered": lambda path: overwrite(path, text_of(2, 1, 0)),
    "edited, same length": lambda path: overwrite(path, text_of(3, 4, 5)),
    "a row put in front": lambda path: overwrite(path, text_of(9, 0, 1, 2)),
    "truncated": lambda path: overwrite(path, text_of(0)[:40]),
    "empty": lambda path: overwrite(path, ""),
    "deleted": lambda path: path.unlink(),
    "replaced by a folder": lambda path: (path.unlink(), path.mkdir()),  # type: ignore[dict-item,func-returns-value]
}


@pytest.mark.parametrize("skip", ["skip", "error"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_changed_since_the_file_was_opened_is_an_error(tmp_path: Path, change: str, skip: str) -> None:
    """Not a bad row, which could be skipped."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text_of(0, 1, 2))
    data = opened(path, on_bad_row=skip)
    CHANGES[change](path)
    with pytest.raises(UserError, match=r"rows\.jsonl was changed while it was used: .*--resume") as error:
        data.take(0), data.take(2)
    assert not isinstance(error.value, RowError)


def test_rows_that_are_what_they_were_are_read(tmp_path: Path) -> None:
    """Whatever was done to the file: touched, copied back, rows added at its end, its last line ended."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text_of(0, 1, 2)[:-1])
    data = opened(path)
    os.utime(path, (1e9, 1e9))
    path.write_bytes(path.read_bytes())
    with path.open("a") as file:
        file.write("\n" + text_of(3))
    assert answers(data) == ["answer 0", "answer 1", "answer 2"]


@pytest.mark.parametrize(("workers", "steps"), [(0, 8), (2, 20)])
def test_data_that_changes_under_a_run_ends_it_and_what_was_trained_is_kept(
    tmp_path: Path,
    mtr: Any,
    write_recipe: Callable[..., Path],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    steps: int,
) -> None:
    """Workers have read ahead when the file changes; what they read before is trained."""
    rows = [{"id": i, **conversation_row(turns=1 + i % 2)} for i in range(10, 10 + 4 * steps)]
    path = write_rows(rows)
    recipe = write_recipe(
        data={"train": str(path), "shuffle": False, "num_workers": workers, "on_bad_row": "skip"},
        training={"max_steps": steps},
    )
    before = path.read_text()

    def write(self: Any, kind: str, line: dict[str, Any]) -> None:
        if kind == "train" and line["step"] == 2:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))

    monkeypatch.setattr("mtr.training.log.RunLog.write", write)
    code, _, err = mtr("train", recipe)
    assert code == 2
    assert "rows.jsonl was changed while it was used: line" in err
    monkeypatch.undo()
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert int(saved.name.removeprefix("checkpoint-")) >= 2
    path.write_text(before)
    state = train(load_recipe(recipe), resume=True)
    assert (state.steps, state.counts.conversations) == (steps, 4 * steps)


def test_an_arrow_file_that_is_written_over_is_an_error(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    data = opened(tmp_path / "saved", on_bad_row="skip")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    content = file.read_bytes().replace(b"answer 1", b"answer 7")
    with file.open("r+b") as opened_file:
        opened_file.write(content)
    os.utime(file, (1e9, 1e9))
    with pytest.raises(UserError, match=r"\.arrow was changed while it was used; .*--resume") as error:
        data.take(1)
    assert not isinstance(error.value, RowError)


def test_an_arrow_file_that_is_deleted_or_replaced_stays_mapped(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    data = opened(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.unlink()
    assert answers(data) == ["answer 0", "answer 1", "answer 2"]
    file.write_bytes(b"another file")
    assert answers(data) == ["answer 0", "answer 1", "answer 2"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [5, 30, 100, 1000])
def test_a_line_that_is_too_long_is_a_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, size: int
) -> None:
    """Wherever the pieces end in which the file is read, the rows around it are found."""
    for name, value in {"MOST_ROW": 120, "CHUNK": size, "BLOCK": size}.items():
        monkeypatch.setattr(f"mtr.data.lines.{name}", value)
    monkeypatch.setattr("mtr.data.sources.BLOCK", size)
    long = json.dumps({"text": "x" * 300})
    text = "\n".join([LINES[0], long, "", LINES[1], " " * 500, long, LINES[2], long]).encode()
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(text) if packed else text)
    data = opened(path, on_bad_row="skip")
    taken = [data.take(i) for i in range(len(data))]
    said = [getattr(t, "reason", None) or t.messages[-1].content for t in taken]  # type: ignore[union-attr]
    lines = [t.where.rpartition(" ")[2] for t in taken]
    found = dict(zip(lines, said, strict=True))
    assert found.pop("5", "longer than 0 MiB") == "longer than 0 MiB", "500 spaces are a blank line or a long one"
    assert found == {
        "1": "answer 0",
        "2": "longer than 0 MiB",
        "4": "answer 1",
        "6": "longer than 0 MiB",
        "7": "answer 2",
        "8": "longer than 0 MiB",
    }


def test_a_file_without_line_breaks_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MOST_ROW": 1000, "BLOCK": 1000, "MOST_LEFT_OUT": 50_000}.items():
        monkeypatch.setattr(f"mtr.data.lines.{name}", value)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(UserError, match=r"bomb\.jsonl\.gz: a line is longer than 0 MiB; JSON lines have"):
        opened(path)

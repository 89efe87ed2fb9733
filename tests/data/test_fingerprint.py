"""Claims: the fingerprint of data is the same while its rows are, and says what changed when they are not."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets as hub
import pyarrow
import pyarrow.parquet
import pytest
from support.sources import LINES, ROWS, generate, numbered, opened

from mtr.data.fingerprint import differences, fingerprint
from mtr.data.json_text import hash_value
from mtr.data.opening import open_data
from mtr.recipe.sections import DataSection


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows, in the format that the name says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        cells = [f"{row['messages'][0]['content']},{row['messages'][1]['content']}\n" for row in rows]
        path.write_text("instruction,output\n" + "".join(cells))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix:
        path.write_text(lines)
    else:
        shutil.rmtree(path, ignore_errors=True)
        hub.Dataset.from_list(rows).save_to_disk(str(path))
    return path


NAMES = ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet", "folder"]
CHANGED = {
    "more": ([*map(numbered, range(5))], "2 rows more (5, were 3)"),
    "fewer": (ROWS[:2], "1 row fewer (2, were 3)"),
    "reordered": (ROWS[::-1], ""),
    "edited": ([numbered(0), numbered(7), numbered(2)], "same number of rows, other content"),
}


def taken(*sources: Any) -> Any:
    """The fingerprint as a checkpoint holds it."""
    return json.loads(json.dumps(fingerprint(opened(*sources))))


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("name", NAMES)
def test_what_changed_is_said(tmp_path: Path, name: str, change: str) -> None:
    rows, said = CHANGED[change]
    path = write(tmp_path / name, ROWS)
    before = taken(path)
    assert differences(before, fingerprint(opened(path))) == []
    write(path, rows)
    (text,) = differences(before, fingerprint(opened(path)))
    assert text.startswith(f"{path}: ")
    if change == "reordered":
        exact = ".jsonl" in name
        said = "the same rows in another order" if exact else "same number of rows, other content"
    assert said in text


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_was_touched_or_moved_is_the_same(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    before = taken(path)
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(file, (1e9, 1e9))
    assert differences(before, fingerprint(opened(path))) == []
    moved = shutil.move(path, tmp_path / f"moved-{name}")
    assert differences(before, fingerprint(opened(moved))) == []


def test_line_breaks_and_compression_do_not_count(tmp_path: Path) -> None:
    before = taken(write(tmp_path / "rows.jsonl", ROWS))
    (tmp_path / "rows.jsonl").write_text("\n\n".join(LINES))
    assert differences(before, fingerprint(opened(tmp_path / "rows.jsonl"))) == []
    assert differences(before, fingerprint(opened(write(tmp_path / "rows.jsonl.gz", ROWS)))) == []


def test_of_several_files_those_that_changed_are_named(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [numbered(i)]) for i, name in enumerate("abc")]
    before = taken(*paths)
    assert differences(before, fingerprint(opened(*reversed(paths)))) == ["the same files, read in another order"]
    assert differences(before, fingerprint(opened(*paths[:2]))) == [f"{paths[2]}: no longer there"]
    assert differences(before, fingerprint(opened(*paths, paths[0]))) == [f"{paths[0]}: new"]
    write(paths[1], ROWS)
    new = write(tmp_path / "d.jsonl", [numbered(9)])
    assert differences(before, fingerprint(opened(paths[0], paths[1], new))) == [
        f"{paths[1]}: 2 rows more (3, were 1)",
        f"{new}: new",
        f"{paths[2]}: no longer there",
    ]
    (tmp_path / "elsewhere").mkdir()
    moved = write(tmp_path / "elsewhere" / "a.jsonl", ROWS)
    assert differences(taken(paths[0]), fingerprint(opened(moved))) == [f"{moved}: 2 rows more (3, were 1)"]


def test_a_mapped_table_of_many_rows_is_sampled(tmp_path: Path) -> None:
    """Its first and last row always; a folder that was saved anew with other rows is noticed in any case."""
    rows = [*map(numbered, range(1000, 2000))]
    path = write(tmp_path / "folder", rows)
    before = taken(path)
    for edited in (0, 999, 501):
        other = [numbered(3000) if i == edited else row for i, row in enumerate(rows)]
        assert len(differences(before, fingerprint(opened(write(path, other))))) == 1


@pytest.mark.parametrize("saved", [None, [], {}, "x", {"sources": []}, {"sources": [3]}, {"sources": [{"name": 1}]}])
def test_a_damaged_record_is_a_difference(tmp_path: Path, saved: Any) -> None:
    (text,) = differences(saved, fingerprint(opened(write(tmp_path / "rows.jsonl", ROWS))))
    assert text == "the record of the data in the checkpoint is damaged, so it cannot be told whether the data changed"


def test_any_value_in_the_record_may_be_damaged(tmp_path: Path) -> None:
    """Nothing is raised, and nothing but the place and the time can be lost without a word."""
    for name in NAMES:
        now = fingerprint(opened(write(tmp_path / name, ROWS)))
        for key in now["sources"][0]:
            for value in (None, "x", -1, [1], {"a": 1}):
                saved = {"sources": [{**now["sources"][0], key: value}]}
                harmless = key in ("modified", "name") or (key == "bytes" and name != "folder")
                harmless |= key == "any_order" or (key == "own" and value is None and now["sources"][0][key] is None)
                harmless &= key != "name" or isinstance(value, str)
                assert bool(differences(saved, now)) != harmless


def test_a_stream_is_known_by_its_name_and_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(start: int) -> dict[str, Any]:
        made = hub.IterableDataset.from_generator(generate, gen_kwargs={"start": start, "count": 5})
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: made)
        section = DataSection.model_validate({"train": "org/name", "streaming": True})
        return fingerprint(open_data(section, section.train))

    before = stream(0)
    assert differences(json.loads(json.dumps(before)), stream(0)) == []
    assert differences(before, stream(1)) == ["org/name: another first row"]


@pytest.mark.parametrize("value", [b"\xff", datetime.datetime(2020, 1, 1), decimal.Decimal("1.5"), [[{"a": None}]]])
def test_a_mapped_table_may_hold_anything(tmp_path: Path, value: Any) -> None:
    hub.Dataset.from_list([{**numbered(0), "other": value}]).save_to_disk(str(tmp_path / "folder"))
    assert differences(taken(tmp_path / "folder"), fingerprint(opened(tmp_path / "folder"))) == []


def test_the_hash_of_a_row_is_that_of_its_content() -> None:
    one, other = {"a": 1, "b": [1.5, None, "ü\ud800"]}, {"b": [1.5, None, "ü\ud800"], "a": 1}
    assert hash_value(one) == hash_value(other)
    assert hash_value({"a": object()}) == hash_value({"a": object()}), "no address in memory"
    hashes = {hash_value(value) for value in (one, [one], {"a": 1}, {"a": "1"}, {"a": None}, {1: 2, "a": 3}, b"x")}
    assert len(hashes) == 7

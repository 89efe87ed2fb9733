"""Claims: every kind of source gives the same rows, and names the file and line of each."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.rows import conversation_row
from support.sources import LINES, ROWS, answers, numbered, opened, refused

from mtr.data.lines import CompressedLines, JsonLines
from mtr.data.mixture import Mixture
from mtr.errors import UserError

WANTED = ["answer 0", "answer 1", "answer 2"]


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("\n".join(LINES) + "\n", [1, 2, 3]),
        ("\n".join(LINES), [1, 2, 3]),
        ("\r\n".join(LINES) + "\r\n", [1, 2, 3]),
        (f"\n\n{LINES[0]}\n   \n{LINES[1]}\n\r\n\t\n{LINES[2]}\n\n\n", [3, 5, 8]),
        (f"{LINES[0]}\n{LINES[1]}\n{LINES[2]}\n   ", [1, 2, 3]),
        (f"  {LINES[0]}  \n\t{LINES[1]}\n{LINES[2]}", [1, 2, 3]),
        (f"{LINES[0]}\n{' ' * 40}\n{LINES[1]}\n{LINES[2]}", [1, 3, 4]),
    ],
    ids=["plain", "no last newline", "crlf", "blank lines", "spaces at the end", "indented", "a long blank line"],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_lines(tmp_path: Path, content: str, lines: list[int], name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    data = opened(path)
    assert answers(data) == WANTED
    assert [data.conversation(i).where for i in range(3)] == [f"{path}, line {line}" for line in lines]


def test_lines_are_found_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtr.data.lines.CHUNK", 7)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{LINES[0]}\n\n{LINES[1]}\n{LINES[2]}")
    rows = JsonLines(path)
    assert [rows.row(i) for i in range(len(rows))] == ROWS
    assert [rows.where(i) for i in range(3)] == [f"{path}, line {line}" for line in (2, 4, 5)]


def test_every_row_keeps_exactly_the_fields_it_has(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "ü", "extra": {"a": None}}, {"role": "assistant", "content": "x"}]}
    path.write_text(f"{json.dumps(row, ensure_ascii=False)}\n{LINES[0]}\n", encoding="utf-8")
    data = opened(path)
    assert dict(data.conversation(0).row) == row
    assert dict(data.conversation(1).row) == ROWS[0]


@pytest.mark.parametrize("content", ["", "\n", "  \n\n\t\n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / name).write_text(content)
    assert refused(tmp_path / name) == f"data: no rows in {tmp_path / name}"


def test_an_empty_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    assert "no rows in" in refused(tmp_path / "rows.json")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n " + json.dumps(ROWS, indent=indent))
    data = opened(path)
    assert answers(data) == WANTED
    assert data.conversation(1).where == f"{path}, row 2"


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINES[0]}\n\n{{broken\n")
    data = opened(path)
    assert data.conversation(0).messages
    with pytest.raises(UserError) as error:
        data.conversation(1)
    assert str(error.value).startswith(f"{path}, line 3: not valid JSON: ")


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES[0].encode() + b'\n{"messages": "\xff\xfe"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not valid JSON"):
        opened(path).conversation(1)


def test_a_broken_array_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[{]")
    assert refused(tmp_path / "rows.json").startswith(f"{tmp_path / 'rows.json'}: not valid JSON")


def test_a_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINES[0]}\n" + '{"messages": [{"role": "human", "content": "x"}]}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2, message 0: unknown role 'human'"):
        opened(path).conversation(1)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda text: pyarrow.compress(text, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", "\n".join(LINES)),
        ("rows.jsonl", f"\n{LINES[0]}\r\n\n{LINES[1]}\n  \n{LINES[2]}\n"),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", "\n".join(LINES)),
    ],
)
def test_compressed_json(tmp_path: Path, kind: str, name: str, content: str) -> None:
    (tmp_path / f"{name}.{kind}").write_bytes(COMPRESS[kind](content.encode()))
    data = opened(tmp_path / f"{name}.{kind}")
    assert answers(data) == WANTED
    assert data.conversation(0).where.startswith(f"{tmp_path / name}.{kind}, ")


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_compressed_file_gives_the_rows_of_the_plain_one(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many blocks, with lines longer than a block, blank ones, and in any order."""
    monkeypatch.setattr("mtr.data.lines.BLOCK", 200)
    lines = [json.dumps({**numbered(i), "long": "x" * (997 * (i % 7 == 0))}) + "\n\n" * (i % 3 == 0) for i in range(60)]
    text = "\n".join(lines).encode()
    (tmp_path / "rows.jsonl").write_bytes(text)
    (tmp_path / f"packed.jsonl.{kind}").write_bytes(COMPRESS[kind](text))
    plain, packed = opened(tmp_path / "rows.jsonl"), opened(tmp_path / f"packed.jsonl.{kind}")
    assert len(plain) == len(packed) == 60
    for i in np.random.default_rng(0).permutation(60).tolist():
        one, two = plain.conversation(i), packed.conversation(i)
        assert one.row == two.row
        assert one.where.rpartition(", ")[2] == two.where.rpartition(", ")[2]


def test_a_compressed_file_is_held_compressed(tmp_path: Path) -> None:
    text = ("\n".join(LINES) + "\n").encode() * 5000
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    (source,) = opened(tmp_path / "rows.jsonl.gz").sources
    assert isinstance(source.rows, CompressedLines)
    assert len(source.rows) == 15_000
    assert sum(len(block) for block, _ in source.rows._blocks) < len(text) / 10


# --- tables -----------------------------------------------------------------------------------------------------------


def mixed_rows() -> list[dict[str, Any]]:
    """Rows whose messages, calls and tools have different keys, so that a typed table fills the others with None."""

    def calling(key: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": key, "arguments": {key: 1}}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {
            "messages": [{"role": "user", "content": "q"}, answer],
            "tools": [{"properties": {key: {"type": "int"}}}],
        }

    return [{**conversation_row(turns=1), "tools": None}, calling("x"), calling("y")]


def check_mixed(data: Mixture) -> None:
    plain, *calling = (data.conversation(i) for i in range(3))
    assert [set(m.data) for m in plain.messages] == [{"role", "content"}, {"role", "content", "reasoning_content"}]
    assert plain.tools is None
    for key, conversation in zip("xy", calling, strict=True):
        assert [set(m.data) - {"content"} for m in conversation.messages] == [{"role"}, {"role", "tool_calls"}]
        call = {"type": "function", "function": {"name": key, "arguments": {key: 1}}}
        assert conversation.messages[1].tool_calls == [call]
        assert conversation.tools == [{"properties": {key: {"type": "int"}}}]


def test_parquet_leaves_out_the_keys_a_row_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(mixed_rows())
    assert table.to_pylist()[0]["messages"][0]["tool_calls"] is None, "the table must hold a None to be left out"
    pyarrow.parquet.write_table(table, path)
    data = opened(path)
    check_mixed(data)
    assert data.conversation(1).where == f"{path}, row 2"


def test_an_arrow_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_list(mixed_rows()).save_to_disk(str(tmp_path / "saved"))
    data = opened(tmp_path / "saved")
    check_mixed(data)
    assert data.conversation(0).where == f"{tmp_path / 'saved'}, row 1"


@pytest.mark.parametrize(("split", "wanted"), [("train", WANTED), ("test", WANTED[:1])])
def test_an_arrow_folder_of_splits(tmp_path: Path, split: str, wanted: list[str]) -> None:
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert answers(opened({"path": str(tmp_path / "saved"), "split": split})) == wanted


def test_an_arrow_file(tmp_path: Path) -> None:
    datasets.Dataset.from_list(mixed_rows()).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    check_mixed(opened(file))


def test_csv_of_texts(tmp_path: Path) -> None:
    """Cells are text even where they look like numbers; an empty cell is absent; a cell may hold lines."""
    path = tmp_path / "rows.csv.gz"
    text = '\ufeffinstruction,input,output\nAdd,"2\nand 3",5\nHow many?,,007\n\n'
    path.write_bytes(gzip.compress(text.encode()))
    data = opened(path)
    asked = [[message.content for message in data.conversation(i).messages] for i in range(len(data))]
    assert asked == [["Add\n2\nand 3", "5"], ["How many?", "007"]]


def test_csv_with_columns_of_json_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "messages", "tools"])
        writer.writerow([1, json.dumps(ROWS[0]["messages"]), json.dumps(tools)])
        writer.writerow([2, json.dumps([{"role": "user", "content": "a\nb"}, ROWS[1]["messages"][1]]), "[]"])
    data = opened(path)
    assert answers(data) == WANTED[:2]
    assert data.conversation(0).tools == tools
    assert data.conversation(1).tools is None
    assert data.conversation(1).messages[0].content == "a\nb"
    assert data.conversation(1).where == f"{path}, row 2"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_broken_table_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"no table at all, only words")
    assert refused(path).startswith(f"{path}: cannot be read: ")


def test_a_broken_arrow_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert str(tmp_path / "saved") in refused(tmp_path / "saved")


# --- places -----------------------------------------------------------------------------------------------------------


def test_a_glob_takes_the_files_in_order(tmp_path: Path) -> None:
    numbers = [7, 2, 9, 0, 4, 11, 1, 8, 3, 10, 6, 5]
    for number in numbers:
        (tmp_path / f"part-{number:02}.jsonl").write_text(json.dumps(numbered(number)))
    (tmp_path / "other.jsonl").write_text(LINES[2])
    (tmp_path / "part-x").mkdir()
    data = opened(tmp_path / "part-*")
    assert answers(data) == [f"answer {i}" for i in range(12)]
    assert data.conversation(2).where == f"{tmp_path / 'part-02.jsonl'}, line 1"


def test_a_file_may_have_the_signs_of_a_glob_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "rows[1].jsonl").write_text("\n".join(LINES))
    assert answers(opened(tmp_path / "rows[1].jsonl")) == WANTED


def test_a_relative_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text("\n".join(LINES))
    monkeypatch.chdir(tmp_path)
    assert answers(opened("sub/*.jsonl")) == WANTED
    assert answers(opened("**/*.jsonl")) == WANTED


def test_a_folder_takes_its_data_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_text(LINES[0])
    (tmp_path / "b" / "a.json").write_text(json.dumps([ROWS[1]]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(LINES[2].encode()))
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    assert answers(opened(tmp_path)) == WANTED


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no data")
    assert refused(tmp_path) == f"{tmp_path}: no data file in this folder (.jsonl, .json, .parquet, .csv, .arrow)"


@pytest.mark.parametrize("name", ["none.jsonl", "./none.jsonl", "sub/none.parquet", "./none", "a/b/c"])
def test_a_missing_file_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    assert refused(name) == f"data: no such file: {name}"
    assert refused(tmp_path / name) == f"data: no such file: {tmp_path / name}"


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "*.jsonl") == f"data: no file matches {tmp_path / '*.jsonl'}"


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text(LINES[0])
    assert "rows.txt: unknown file type; data files are .jsonl, .json" in refused(tmp_path / "rows.txt")


def test_what_the_hub_says_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert refused("org/name") == "data: org/name is not a local file, and loading it from the Hub failed: no network"


def test_a_hub_data_set_is_asked_for_as_the_source_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []

    def load_dataset(*arguments: Any, **keys: Any) -> Any:
        asked.append((arguments, keys))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = opened({"path": "org/name", "name": "part", "split": "test", "revision": "v1"}, streaming=False)
    assert answers(data) == WANTED
    assert data.conversation(1).where == "org/name, row 2"
    assert asked == [(("org/name", "part"), {"split": "test", "revision": "v1", "streaming": False})]

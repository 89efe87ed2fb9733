"""Claims: every kind of source gives the same rows, and names the file and line of each; an epoch takes each source as
often as its weight says, in an order that is a function of seed and epoch alone.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import conversation_row

from mtr.data.conversation import Conversation, SkippedRow
from mtr.data.mixture import Mixture, fill_steps
from mtr.data.notes import count_repeating, describe_data
from mtr.data.opening import open_data, open_training_data, split_data
from mtr.data.policy import Policy
from mtr.data.shapes import Reader
from mtr.data.sources import CompressedLines, JsonLines
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.recipe.sections import DataSection, Source


def numbered(number: int) -> dict[str, Any]:
    """A row that can be told from the others."""
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
    monkeypatch.setattr("mtr.data.sources._CHUNK", 7)
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
    monkeypatch.setattr("mtr.data.sources._BLOCK", 200)
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
    assert "rows.txt: unknown kind of file; data files are .jsonl, .json" in refused(tmp_path / "rows.txt")


def test_what_the_hub_says_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert refused("org/name") == "data: org/name is no file here, and the Hub says: no network"


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


# --- mixing -----------------------------------------------------------------------------------------------------------


def two_files(tmp_path: Path, first: float, second: float) -> Mixture:
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(numbered(i))}\n" for i in range(10)))
    (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(numbered(i))}\n" for i in range(10, 16)))
    return opened(
        {"path": str(tmp_path / "a.jsonl"), "weight": first}, {"path": str(tmp_path / "b.jsonl"), "weight": second}
    )


def test_rows_are_numbered_through_all_sources_in_file_order(tmp_path: Path) -> None:
    data = two_files(tmp_path, 0.5, 2)
    assert len(data) == 16
    assert answers(data) == [f"answer {i}" for i in range(16)]
    assert data.conversation(10).where == f"{tmp_path / 'b.jsonl'}, line 1"
    for index in (16, -1):
        with pytest.raises(UserError, match="the data has 16 rows, counted from 0"):
            data.conversation(index)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("weight", "size"), [(0.5, 5), (1, 10), (2, 20), (2.5, 25), (0.25, 2), (0.07, 1)])
def test_an_epoch_holds_each_source_as_often_as_its_weight_says(
    tmp_path: Path, weight: float, size: int, shuffle: bool
) -> None:
    times = Counter(two_files(tmp_path, weight, 1).epoch(0, 42, shuffle).tolist())
    assert sum(times[i] for i in range(10)) == size
    assert all(int(weight) <= times[i] <= int(weight) + 1 for i in range(10))
    assert [times[i] for i in range(10, 16)] == [1] * 6


def test_without_shuffling_an_epoch_is_in_file_order(tmp_path: Path) -> None:
    assert two_files(tmp_path, 1, 1).epoch(3, 42, shuffle=False).tolist() == list(range(16))
    half = two_files(tmp_path, 0.5, 1).epoch(0, 42, shuffle=False).tolist()
    assert half == sorted(half)


def test_the_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    data, again = two_files(tmp_path, 1, 1), two_files(tmp_path, 1, 1)
    order = data.epoch(0, 42, shuffle=True)
    assert np.array_equal(order, data.epoch(0, 42, shuffle=True))
    assert np.array_equal(order, again.epoch(0, 42, shuffle=True))
    assert sorted(order) == list(range(16))
    assert order.tolist() != list(range(16))
    assert not np.array_equal(order, data.epoch(1, 42, shuffle=True))
    assert not np.array_equal(order, data.epoch(0, 43, shuffle=True))


def test_a_share_of_a_source_differs_between_epochs(tmp_path: Path) -> None:
    data = two_files(tmp_path, 0.5, 1)
    shares = [frozenset(n for n in data.epoch(epoch, 42, shuffle=True).tolist() if n < 10) for epoch in range(6)]
    assert len(set(shares)) > 1
    assert frozenset().union(*shares) > shares[0]


# --- streams ----------------------------------------------------------------------------------------------------------


def generate(start: int, count: int) -> Iterator[dict[str, Any]]:
    for number in range(start, start + count):
        yield numbered(number)


def stream(*sizes: int, weights: tuple[float, ...] = (1.0, 1.0), buffer: int = 100) -> Stream:
    sources, start = [], 0
    for number, size in enumerate(sizes):
        made = datasets.IterableDataset.from_generator(generate, gen_kwargs={"start": start, "count": size})
        sources.append((made, f"org/{'ab'[number]}", weights[number]))
        start += size
    return Stream(tuple(sources), (Reader(),) * len(sources), buffer=buffer)


def taken(data: Stream, epoch: int = 0, seed: int = 1, shuffle: bool = True) -> list[str]:
    return [c.messages[-1].content.removeprefix("answer ") for c in conversations_of(data, epoch, seed, shuffle)]


def conversations_of(data: Stream, epoch: int = 0, seed: int = 1, shuffle: bool = True) -> list[Conversation]:
    rows = list(data.rows(epoch, seed, shuffle))
    assert not any(isinstance(row, SkippedRow) for row in rows)
    return [row for row in rows if isinstance(row, Conversation)]


def test_a_stream_gives_every_row_in_order_and_says_where_it_is() -> None:
    conversations = conversations_of(stream(20), shuffle=False)
    assert [c.messages[-1].content for c in conversations] == [f"answer {i}" for i in range(20)]
    assert [c.where for c in conversations] == [f"org/a, row {i + 1}" for i in range(20)]
    assert set(conversations[0].row) == {"id", "messages"}


def test_a_shuffled_stream_keeps_the_place_of_each_row_and_repeats_its_order() -> None:
    conversations = conversations_of(stream(20), shuffle=True)
    order = [int(c.row["id"]) for c in conversations]
    assert [c.where for c in conversations] == [f"org/a, row {i + 1}" for i in order]
    assert order != list(range(20))
    assert sorted(order) == list(range(20))
    assert taken(stream(20)) == [str(i) for i in order]
    assert taken(stream(20), epoch=1) != [str(i) for i in order]
    assert taken(stream(20), seed=7) != [str(i) for i in order]


def test_streams_mix_in_an_order_that_repeats() -> None:
    order = taken(stream(20, 10))
    assert order == taken(stream(20, 10))
    assert set(order) == {str(i) for i in range(30)}
    conversations = conversations_of(stream(20, 10), shuffle=False)
    assert {c.where.split(",")[0] for c in conversations} == {"org/a", "org/b"}


def test_the_weights_of_streams_are_their_shares() -> None:
    def share(weights: tuple[float, float]) -> float:
        first = taken(stream(300, 300, weights=weights), shuffle=False)[:200]
        return sum(int(i) < 300 for i in first) / len(first)

    assert share((9.0, 1.0)) > 0.8
    assert share((1.0, 9.0)) < 0.2


def test_a_bad_row_of_a_stream_is_named() -> None:
    made = datasets.IterableDataset.from_generator(lambda: iter([ROWS[0], {"messages": []}]))
    data = Stream(((made, "org/a", 1.0),), (Reader(),))
    with pytest.raises(UserError, match="org/a, row 2: 'messages' must be a non-empty list"):
        list(data.rows(0, 1, shuffle=False))


def test_a_hub_source_is_streamed_and_does_not_mix_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.IterableDataset.from_generator(generate, gen_kwargs={"start": 0, "count": 3})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: made)
    section = DataSection(train=[Source(path="org/name")])
    data = open_data(section, section.train)
    assert isinstance(data, Stream)
    assert taken(data, shuffle=False) == ["0", "1", "2"]
    (tmp_path / "a.jsonl").write_text(LINES[0])
    assert "Hub streams and local files cannot be mixed; set data.streaming to false" in refused(
        "org/name", tmp_path / "a.jsonl"
    )


# --- what is passed over ----------------------------------------------------------------------------------------------

BAD = {"messages": [{"role": "bot", "content": "x"}]}


def taken_from(*rows: Any, path: Path, **keys: Any) -> tuple[Mixture, list[Conversation | SkippedRow]]:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    data = opened(path, **keys)
    return data, [data.take(i) for i in range(len(data))]


def test_a_bad_row_is_an_error_or_passed_over_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = (ROWS[0], BAD, "{broken\n", ROWS[1])
    with pytest.raises(UserError, match="line 2, message 0: unknown role 'bot'"):
        taken_from(*rows, path=path)
    data, (first, role, broken, last) = taken_from(*rows, path=path, on_bad_row="skip")
    assert isinstance(first, Conversation)
    assert isinstance(last, Conversation)
    roles = "roles are system, developer, user, assistant, tool"
    assert role == SkippedRow(1, f"{path}, line 2", "unknown role", f"message 0: unknown role 'bot'; {roles}")
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


def test_a_stream_passes_over_bad_rows_too() -> None:
    made = datasets.IterableDataset.from_generator(lambda: iter([ROWS[0], {"messages": []}, ROWS[1]]))
    data = Stream(((made, "org/a", 1.0),), (Reader(),), Policy(skip_bad=True))
    kinds = [type(row) for row in data.rows(0, 1, shuffle=False)]
    assert kinds == [Conversation, SkippedRow, Conversation]
    assert [c.where for c in data.first(2)] == ["org/a, row 1", "org/a, row 3"]


def test_each_stream_has_the_shape_of_its_first_row() -> None:
    spoken = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": str(i)}]} for i in range(3)]
    asked = [{"prompt": "q", "completion": str(i)} for i in range(3, 6)]
    made = [datasets.IterableDataset.from_generator(lambda rows=rows: iter(rows)) for rows in (spoken, asked)]
    sources = tuple((stream, f"org/{i}", 1.0) for i, stream in enumerate(made))
    assert set(taken(Stream(sources, (Reader(shape=None),) * 2))) == set("012345")


# --- a share for evaluation -------------------------------------------------------------------------------------------


def many(tmp_path: Path, count: int = 100, group: int = 1) -> Path:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({**numbered(i), "question": i // group}) + "\n" for i in range(count)))
    return path


def divided(path: Path, seed: int = 1, **keys: Any) -> tuple[Mixture, Mixture]:
    data, held_back = open_training_data(DataSection.model_validate({"train": str(path), **keys}), seed)
    assert isinstance(data, Mixture)
    assert held_back is not None
    return data, held_back


@pytest.mark.parametrize("shuffle", [True, False])
def test_what_is_held_back_is_never_trained(tmp_path: Path, shuffle: bool) -> None:
    train, held_back = divided(many(tmp_path), eval_fraction=0.1)
    assert (train.num_rows, held_back.num_rows) == (90, 10)
    evaluated = set(held_back.epoch(0, 1, shuffle).tolist())
    assert len(evaluated) == 10
    for epoch in range(3):
        assert sorted({*train.epoch(epoch, 1, shuffle).tolist()} | evaluated) == list(range(100))
        assert not {*train.epoch(epoch, 1, shuffle).tolist()} & evaluated


def test_the_share_is_a_function_of_the_seed(tmp_path: Path) -> None:
    def rows(seed: int) -> list[int]:
        return [int(i) for i in divided(many(tmp_path), seed, eval_fraction=0.2)[1].epoch(0, 1, shuffle=False)]

    assert rows(1) == rows(1) != rows(2)


def test_a_group_is_held_back_whole(tmp_path: Path) -> None:
    train, held_back = divided(many(tmp_path, group=8), eval_fraction=0.1, group_by="question")
    questions = [{i // 8 for i in part.epoch(0, 1, shuffle=True).tolist()} for part in (train, held_back)]
    assert not questions[0] & questions[1]
    assert questions[0] | questions[1] == set(range(13))
    assert held_back.num_rows in (12, 16)


def test_weights_hold_for_what_is_left(tmp_path: Path) -> None:
    train, _ = divided(many(tmp_path), eval_fraction=0.1)
    source = replace(train.sources[0], weight=2.0)
    assert Counter(Counter(replace(train, sources=(source,)).epoch(0, 1, shuffle=True).tolist()).values()) == {2: 90}
    with pytest.raises(UserError, match="leaves nothing to train on"):
        split_data(opened(many(tmp_path, count=1)), 0.5, 1)


def test_a_stream_cannot_be_divided_or_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.IterableDataset.from_generator(generate, gen_kwargs={"start": 0, "count": 3})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: made)
    for keys in ({"eval_fraction": 0.1}, {"group_by": "id"}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(keys))}: a Hub stream .* set data.streaming to false"):
            open_training_data(DataSection.model_validate({"train": "org/name", **keys}), 1)


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_groups_stay_together_and_within_a_step(tmp_path: Path, shuffle: bool) -> None:
    data, _ = open_training_data(
        DataSection.model_validate({"train": str(many(tmp_path, count=96, group=8)), "group_by": "question"}), 1
    )
    assert isinstance(data, Mixture)
    order = data.epoch(0, 42, shuffle, step_size=16)
    assert sorted(order.tolist()) == list(range(96))
    for start in range(0, 96, 8):
        group = order[start : start + 8].tolist()
        assert group == list(range(group[0], group[0] + 8))
    assert np.array_equal(order, data.epoch(0, 42, shuffle, step_size=16))
    assert np.array_equal(order, data.epoch(1, 42, shuffle, step_size=16)) != shuffle


def test_members_that_lie_apart_come_together(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**numbered(i), "question": f"q{i % 4}"}) + "\n" for i in range(12)) + LINES[0])
    data, _ = open_training_data(DataSection.model_validate({"train": str(path), "group_by": "question"}), 1)
    assert isinstance(data, Mixture)
    order = data.epoch(0, 1, shuffle=False, step_size=6).tolist()
    assert order[:12] == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert order[12] == 12, "a row without the column stands alone"


def test_a_source_taken_twice_has_each_group_twice(tmp_path: Path) -> None:
    section = {"train": [{"path": str(many(tmp_path, count=24, group=4)), "weight": 2.5}], "group_by": "question"}
    data, _ = open_training_data(DataSection.model_validate(section), 1)
    assert isinstance(data, Mixture)
    order = data.epoch(0, 1, shuffle=True, step_size=12).tolist()
    assert Counter(Counter(order).values()) == {2: 12, 3: 12}
    for start in range(0, 60, 4):
        assert len({i // 4 for i in order[start : start + 4]}) == 1


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_a_step_ends_inside_a_group_only_where_none_fits(sizes: list[int], step_size: int) -> None:
    groups = [[i] * size for i, size in enumerate(sizes)]
    order = fill_steps(groups, step_size)
    assert Counter(order) == Counter(i for group in groups for i in group)
    assert len([None for i in range(len(order)) if i == 0 or order[i] != order[i - 1]]) == len(sizes), "all adjacent"
    for end in range(step_size, len(order), step_size):
        start = order.index(order[end])
        if end - step_size < start < end:  # a group begins in this step and ends in a later one
            assert all(sizes[i] > end - start for i in set(order[end:])), "another one would have fitted"


# --- what is said about the data --------------------------------------------------------------------------------------


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
    assert note.startswith("2 of the first 4 rows are the beginning of another row or equal to one: the data is split")


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

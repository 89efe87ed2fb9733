"""Claims: whatever a row, a file or a table holds, the end is a conversation or one line that says what is wrong.

`MTR_FUZZ_EXAMPLES` sets the number of examples of each fuzzer.
"""

from __future__ import annotations

import copy
import datetime
import decimal
import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.sources import LINES, numbered, opened

from mtr.data.conversation import Conversation
from mtr.data.notes import describe_data
from mtr.data.opening import group_rows
from mtr.data.shapes import Reader
from mtr.errors import RowError, UserError

EXAMPLES = int(os.environ.get("MTR_FUZZ_EXAMPLES", "150"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, {"y": 2}]}'}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [CALL], "weight": 0.5},
    {"role": "tool", "tool_call_id": "a", "name": "f", "content": "7"},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "So."}, {"type": "text", "text": "7"}]},
]
GOOD: list[dict[str, Any]] = [
    {"id": 1, "messages": CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"messages": json.dumps(CHAT), "tools": "[]", "system": "Be brief."},
    {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '<think>Hm.</think>{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "7"},
        ]
    },
    {"prompt": CHAT[:2], "completion": [CHAT[4]]},
    {"prompt": "Hi", "completion": "Hello"},
    {"instruction": "Add", "input": "2", "output": "4", "history": [["a", "b"]], "system": "Be brief."},
]
WORDS = ["role", "content", "from", "value", "name", "type", "thinking", "[]", "{}", "[[", '{"a": 1, "a": 2}', "\ud800"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.builds(lambda: 10**4000),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.just(datetime.datetime(2020, 1, 1)),
    st.just(decimal.Decimal("1.5")),
    st.builds(lambda: "x" * 100_000),
    st.builds(lambda: json.loads("[" * 60 + "]" * 60)),
    st.builds(lambda: "[" * 900 + "]" * 900),
)
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=3), st.integers(), st.none(), st.just(("a", 1)))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)


def places(value: dict[Any, Any] | list[Any]) -> list[tuple[Any, Any]]:
    """Every container in it with each of its keys or indices."""
    found, left = [], [value]
    while left:
        container = left.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        found += [(container, key) for key in keys]
        left += [container[key] for key in keys if isinstance(container[key], (dict, list))]
    return found


@st.composite
def damaged_rows(draw: st.DrawFn) -> Any:
    """A good row with one to three places in it replaced, left out, or given another key."""
    whole = [copy.deepcopy(draw(st.sampled_from(GOOD)))]
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(whole) or [({None: whole}, None)]))
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "replace":
            container[key] = draw(VALUES)
        elif how == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(KEYS)] = draw(VALUES)
        else:
            container.append(draw(VALUES))
    return whole[0] if whole else None


def check(error: UserError) -> None:
    text = str(error)
    assert len(text.splitlines()) == 1
    assert len(text) < 3000


@fuzz
@given(damaged_rows(), st.sampled_from([None, "messages", "sharegpt", "prompt_completion", "instruction"]))
def test_a_damaged_row_is_a_conversation_or_a_bad_row(row: Any, shape: Any) -> None:
    reader = Reader(shape) if shape else Reader(None).with_shape_of([row])
    try:
        conversation = reader.read(row, "rows.jsonl, line 1")
    except RowError as error:
        check(error)
        return
    assert isinstance(conversation, Conversation)
    assert conversation.turns
    for message in conversation.messages:
        assert isinstance(message.content, str)
        assert isinstance(message.thinking, str | None)
        assert isinstance(message.tool_calls, list)


def use(path: Path, on_bad_row: str = "skip") -> None:
    """Everything that is done with data before it is rendered."""
    try:
        data = opened(path, on_bad_row=on_bad_row)
        describe_data(data)
        for column in ("id", "messages"):
            try:
                group_rows(data, column)
            except UserError as error:
                check(error)
        for number in range(len(data)):
            data.take(number)
    except UserError as error:
        check(error)


def spelled(value: Any) -> bytes:
    return json.dumps(value, default=str, skipkeys=True).encode()


ODD_TEXTS: dict[str, bytes] = {
    "good": LINES[0].encode(),
    "a large number": b'{"a":' + b"9" * 5000 + b"}",
    "brackets": b"[" * 3000,
    "nested": b'{"a":' * 300 + b"1" + b"}" * 300,
    "half a character": b'{"messages":"\xed\xa0\x80"}',
    "no number": b'{"messages": NaN}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a carriage return": b"\r",
    "zeros": b"\x00" * 100,
}
TEXTS = st.one_of(
    damaged_rows().map(spelled),
    VALUES.map(spelled),
    st.binary(max_size=30),
    st.sampled_from(list(ODD_TEXTS)).map(ODD_TEXTS.__getitem__),
)
FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst", ".csv.xz", ".json.bz2")


@fuzz
@given(st.lists(TEXTS, max_size=4), st.sampled_from(FORMATS), st.booleans(), st.sampled_from(["skip", "error"]))
def test_a_file_of_anything_is_data_or_refused(
    tmp_path_factory: Any, lines: list[bytes], suffix: str, odd: bool, bad: str
) -> None:
    path = tmp_path_factory.mktemp("any") / f"rows{suffix}"
    text = b"[" + b",".join(lines) + b"]" if odd and suffix.startswith(".json") else b"\n".join(lines)
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") and not odd else text)
    use(path, bad)


ODD_COLUMNS: dict[str, Any] = {
    "bytes": pyarrow.array([b"\xff\xfe", b"x"]),
    "a time": pyarrow.array([datetime.datetime(2020, 1, 1)] * 2),
    "decimals": pyarrow.array([decimal.Decimal("1.5")] * 2),
    "no text": pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"\xff\xfe\xff\xfe")
    ),
    "a map": pyarrow.array([[("a", 1)]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "a day far away": pyarrow.array([2**31 - 1] * 2, pyarrow.int32()).cast(pyarrow.date32()),
    "messages of bytes": pyarrow.array([[{"role": b"user", "content": b"Hi"}]] * 2),
    "messages with times": pyarrow.array([[{"role": "assistant", "content": datetime.date(2020, 1, 1)}]] * 2),
    "nothing": pyarrow.nulls(2),
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_a_table_of_odd_types_is_data_or_refused(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    for column in ("messages", "other"):
        columns = {column: ODD_COLUMNS[name]}
        if column == "other":
            columns["messages"] = pyarrow.array([numbered(i)["messages"] for i in range(2)])
        table = pyarrow.table(columns)
        if suffix == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        use(path)


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array([1])] * 2, names=["a", "a"]), path)
    use(path)


@pytest.mark.parametrize("metadata", ["no JSON", "{}", '{"info": {"features": {"messages": {"_type": "Image"}}}}'])
def test_a_table_with_wrong_metadata_is_data_or_refused(tmp_path: Path, metadata: str) -> None:
    table = pyarrow.Table.from_pylist([numbered(0)]).replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    use(tmp_path / "rows.parquet")


@fuzz
@given(st.integers(0), st.binary(min_size=1, max_size=8), st.booleans())
def test_a_damaged_parquet_file_is_data_or_refused(tmp_path_factory: Any, at: int, patch: bytes, cut: bool) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([numbered(i) for i in range(20)]), path)
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(patch)] = patch
    path.write_bytes(content[:at] if cut else content)
    use(path)


def test_a_damaged_arrow_folder_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([numbered(i) for i in range(3)]).save_to_disk(str(tmp_path / "saved"))
    for file in sorted((tmp_path / "saved").iterdir()):
        content = file.read_bytes()
        for damaged in (b"", b"{}", b"[]", b"\xff" * 10, content[:100]):
            file.write_bytes(damaged)
            use(tmp_path / "saved")
        file.write_bytes(content)
    assert len(opened(tmp_path / "saved")) == 3

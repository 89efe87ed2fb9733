"""Claims: whatever is wrong with a row or a file, the user gets one line that names it, says what is wrong and, where
it is not obvious, how to fix it. One table of rows, one of files; a text that ends in "..." is pinned up to there.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from mtr.data.mixture import Mixture
from mtr.data.opening import open_training_data
from mtr.errors import UserError
from mtr.recipe.sections import DataSection

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
GOOD = json.dumps({"messages": [USER, ANSWER]}).encode()


def assistant(**keys: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **keys}]}


BAD_ROWS: dict[str, tuple[Any, str, str]] = {
    "row is a list": ([USER], "", "a row is a JSON object, this is a list"),
    "row is text": ("hi", "", "a row is a JSON object, this is str 'hi'"),
    "row is null": (None, "", "a row is a JSON object, this is null"),
    "no messages": (
        {"chat": [], "id": 1},
        "",
        "no 'messages' column (found: chat, id); name yours in data.messages or data.columns",
    ),
    "nothing at all": ({}, "", "no 'messages' column (found: nothing); name yours in data.messages or data.columns"),
    "messages are null": (
        {"messages": None},
        "",
        "no 'messages' column (found: messages); name yours in data.messages or data.columns",
    ),
    "messages are empty": (
        {"messages": []},
        "",
        "'messages' must be a non-empty list of messages, this is an empty list",
    ),
    "messages are text": (
        {"messages": "hi"},
        "",
        "'messages' must be a non-empty list of messages, this is str 'hi'",
    ),
    "messages are an object": (
        {"messages": {"role": "user"}},
        "",
        "'messages' must be a non-empty list of messages, this is an object with role",
    ),
    "messages are broken JSON text": (
        {"messages": "[{"},
        "",
        "'messages' must be a non-empty list of messages, this is str '[{'",
    ),
    "a message is text": (
        {"messages": ["hi"]},
        ", message 0",
        "a message is an object with role and content, this is str 'hi'",
    ),
    "a message is null": (
        {"messages": [USER, None]},
        ", message 1",
        "a message is an object with role and content, this is null",
    ),
    "unknown role": (
        {"messages": [{"role": "human", "content": "x"}]},
        ", message 0",
        "unknown role 'human'; roles are system, developer, user, assistant, tool",
    ),
    "no role": (
        {"messages": [USER, {"content": "x"}]},
        ", message 1",
        "unknown role None; roles are system, developer, user, assistant, tool",
    ),
    "role is a number": (
        {"messages": [{"role": 3, "content": "x"}]},
        ", message 0",
        "unknown role 3; roles are ...",
    ),
    "ShareGPT keys": (
        {"messages": [{"from": "human", "value": "x"}]},
        ", message 0",
        "a ShareGPT message among OpenAI messages; give ShareGPT rows a source of their own, with format: sharegpt",
    ),
    "no assistant message": (
        {"messages": [USER, {"role": "system", "content": "x"}]},
        "",
        "no assistant message, so there is nothing to train; remove the row",
    ),
    "image part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}, ANSWER]},
        ", message 0",
        "images, videos or sound, and only text is trained (a part of type image); remove the row",
    ),
    "sound": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, ANSWER]},
        ", message 0",
        "images, videos or sound, and only text is trained (a part of type input_audio); remove the row",
    ),
    "images beside the messages": (
        {"messages": [USER, ANSWER], "images": ["a.png"]},
        "",
        "images, videos or sound, and only text is trained (column 'images'); remove the row",
    ),
    "an image with a place in the text": (
        {"messages": [{"role": "user", "content": "<image>What is it?"}, ANSWER], "image": "a.png"},
        "",
        "images, videos or sound, and only text is trained (column 'image'); remove the row",
    ),
    "an unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "reimage"}]}, ANSWER]},
        ", message 0",
        "content must be text or a list of text parts, this is a list (reimage parts)",
    ),
    "content is a number": (
        assistant(content=5),
        ", message 1",
        "content must be text or a list of text parts, this is int 5",
    ),
    "content is an object": (
        assistant(content={"text": "x"}),
        ", message 1",
        "content must be text or a list of text parts, this is an object with text",
    ),
    "a text part without text": (
        assistant(content=[{"type": "text"}]),
        ", message 1",
        "content must be text or a list of text parts, this is a list (text parts)",
    ),
    "content is a list of strings": (
        assistant(content=["x"]),
        ", message 1",
        "content must be text or a list of text parts, this is a list",
    ),
    "a thinking part without thinking": (
        assistant(content=[{"type": "thinking"}, {"type": "text", "text": "x"}]),
        ", message 1",
        "a thinking part needs its thinking as text, this is null",
    ),
    "thinking parts in the middle": (
        assistant(content=[{"type": "text", "text": "x"}, {"type": "thinking", "thinking": "y"}]),
        ", message 1",
        "thinking parts must come before the text; move them to the front",
    ),
    "thinking twice": (
        assistant(content=[{"type": "thinking", "thinking": "y"}], reasoning_content="z"),
        ", message 1",
        "thinking both in a field and in parts of the content; remove one",
    ),
    "a user's thinking part": (
        {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "y"}]}, ANSWER]},
        ", message 0",
        "content must be text or a list of text parts, this is a list (thinking parts)",
    ),
    "thinking is a list": (
        assistant(content="x", reasoning_content=["hm"]),
        ", message 1",
        "'reasoning_content' must be text, this is a list",
    ),
    "thinking is an object": (
        assistant(content="x", thinking={"text": "hm"}),
        ", message 1",
        "'thinking' must be text, this is an object with text",
    ),
    "assistant says nothing": (
        assistant(reasoning_content="hm"),
        ", message 1",
        "an assistant message needs content or tool_calls",
    ),
    "user says nothing": (
        {"messages": [{"role": "user"}, ANSWER]},
        ", message 0",
        "a user message needs content",
    ),
    "tool result is null": (
        {"messages": [USER, ANSWER, {"role": "tool", "content": None}]},
        ", message 2",
        "a tool message needs content",
    ),
    "weight is negative": (
        assistant(content="x", weight=-1),
        ", message 1",
        "'weight' must be true, false or a number from 0 to 1e6, got -1",
    ),
    "weight is text": (
        assistant(content="x", train="no"),
        ", message 1",
        "'train' must be true, false or a number from 0 to 1e6, got 'no'",
    ),
    "weight is infinite": (
        assistant(content="x", loss_weight=float("inf")),
        ", message 1",
        "'loss_weight' must be true, false or a number from 0 to 1e6, got inf",
    ),
    "weight is no number": (
        assistant(content="x", weight=float("nan")),
        ", message 1",
        "'weight' must be true, false or a number from 0 to 1e6, got nan",
    ),
    "tool_calls are an object": (
        assistant(tool_calls={"name": "f"}),
        ", message 1",
        "tool_calls must be a list, this is an object with name",
    ),
    "tool_calls are text": (
        assistant(tool_calls="f(x)"),
        ", message 1",
        "tool_calls must be a list, this is str 'f(x)'",
    ),
    "a call is text": (
        assistant(tool_calls=["f"]),
        ", message 1",
        "a tool call needs a function with a name, this is str 'f'",
    ),
    "a call has no name": (
        assistant(tool_calls=[{"function": {"arguments": {}}}]),
        ", message 1",
        "a tool call needs a function with a name, this is an object with function",
    ),
    "a call's function is a name": (
        assistant(tool_calls=[{"function": "f"}]),
        ", message 1",
        "a tool call needs a function with a name, this is an object with function",
    ),
    "arguments are broken JSON": (
        assistant(tool_calls=[{"function": {"name": "f", "arguments": "{x: 1}"}}]),
        ", message 1",
        "tool arguments are not valid JSON (in a call of 'f': Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)); fix them",
    ),
    "tools are an object": (
        {"messages": [USER, ANSWER], "tools": {"name": "f"}},
        "",
        "'tools' must be a list of tool schemas, this is an object with name",
    ),
    "tools are words": (
        {"messages": [USER, ANSWER], "tools": "search"},
        "",
        "'tools' must be a list of tool schemas, this is str 'search'",
    ),
    "only an unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        ", message 0",
        "images, videos or sound, and only text is trained (a part of type image_url); remove the row",
    ),
    "half a surrogate pair": (
        assistant(content="\ud800"),
        ", message 1",
        "not valid text: 'utf-8' codec can't encode character '\\ud800' in position 1: surrogates not allowed; "
        "fix or remove the broken escape",
    ),
    "a tool schema is a name": (
        {"messages": [USER, ANSWER], "tools": ["search"]},
        "",
        "'tools' must be a list of tool schemas, this is a list",
    ),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "A"}, USER, ANSWER], "system": "B"},
        "",
        "two system prompts, one in the column 'system' and one in the messages; remove one, or set data.columns to "
        "{system: null} to leave the column unread",
    ),
    "system is a list": (
        {"messages": [USER, ANSWER], "system": ["B"]},
        "",
        "'system' must be text, this is a list",
    ),
}

BAD_SHAPES: dict[str, tuple[str, Any, str, str]] = {
    "ShareGPT without its column": (
        "sharegpt",
        {"messages": None, "id": 1},
        "",
        "no 'conversations' column (found: id); name yours in data.columns",
    ),
    "ShareGPT is empty": (
        "sharegpt",
        {"conversations": []},
        "",
        "'conversations' must be a non-empty list of messages, this is an empty list",
    ),
    "ShareGPT with OpenAI messages": (
        "sharegpt",
        {"messages": [USER, ANSWER]},
        ", message 0",
        "a ShareGPT message must be an object with from and value, this is an object with role, content",
    ),
    "ShareGPT message is text": (
        "sharegpt",
        {"conversations": ["hi"]},
        ", message 0",
        "a ShareGPT message must be an object with from and value, this is str 'hi'",
    ),
    "unknown speaker": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "x"}, {"from": "bing", "value": "x"}]},
        ", message 1",
        "unknown speaker 'bing'; speakers are system, human, user, gpt, assistant, function_call, tool, observation, "
        "function_response",
    ),
    "speaker is a number": (
        "sharegpt",
        {"conversations": [{"from": 1, "value": "x"}]},
        ", message 0",
        "unknown speaker 1; speakers are ...",
    ),
    "ShareGPT message without a value": (
        "sharegpt",
        {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]},
        ", message 0",
        "a user message needs content",
    ),
    "ShareGPT value is a list": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": ["x"]}, {"from": "gpt", "value": "x"}]},
        ", message 0",
        "content must be text or a list of text parts, this is a list",
    ),
    "a function_call is words": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "look it up"}]},
        ", message 1",
        "a function_call must be JSON with name and arguments, this is str 'look it up'; fix the JSON",
    ),
    "a function_call has no name": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": '{"arguments": {}}'}]},
        ", message 1",
        "a function_call must be JSON with name and arguments, this is str '{\"arguments\": {}}'; fix the JSON",
    ),
    "nobody answers": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "x"}]},
        "",
        "no assistant message, so there is nothing to train; remove the row",
    ),
    "no completion": (
        "prompt_completion",
        {"prompt": "x", "response": "y"},
        "",
        "no 'completion' column (found: prompt, response); name yours in data.columns",
    ),
    "completion is null": (
        "prompt_completion",
        {"prompt": "x", "completion": None},
        "",
        "no 'completion' column (found: prompt); name yours in data.columns",
    ),
    "prompt is a number": (
        "prompt_completion",
        {"prompt": 5, "completion": "x"},
        "",
        "'prompt' must be text or a list of messages, this is int 5",
    ),
    "completion is a list of texts": (
        "prompt_completion",
        {"prompt": "x", "completion": ["a", "b"]},
        "",
        "'completion' must be text or a list of messages, this is a list",
    ),
    "completion is the user's": (
        "prompt_completion",
        {"prompt": [USER], "completion": [USER]},
        "",
        "no assistant message, so there is nothing to train; remove the row",
    ),
    "no output": (
        "instruction",
        {"instruction": "x", "input": ""},
        "",
        "no 'output' column (found: instruction, input); name yours in data.columns",
    ),
    "output is a number": (
        "instruction",
        {"instruction": "x", "output": 42},
        "",
        "'output' must be text, this is int 42",
    ),
    "input is a list": (
        "instruction",
        {"instruction": "x", "input": ["y"], "output": "z"},
        "",
        "'input' must be text, this is a list",
    ),
    "history is not in pairs": (
        "instruction",
        {"instruction": "x", "output": "y", "history": [["a", "b"], ["c"]]},
        "",
        "'history' must be a list of [user, assistant] pairs of texts, this is a list",
    ),
}

UTF_16 = json.dumps({"messages": [USER, ANSWER]}).encode("utf-16")
BAD_FILES: dict[str, tuple[str, bytes | None, dict[str, Any], str]] = {
    "there is no file": ("rows.jsonl", None, {}, "data: no such file: {file}"),
    "nothing matches": ("*.jsonl", None, {}, "data: no file matches {file}"),
    "an empty file": ("rows.jsonl", b"", {}, "data: no rows in {file}"),
    "blank lines only": ("rows.jsonl", b"\n \n\t\n", {}, "data: no rows in {file}"),
    "an empty array": ("rows.json", b"[]", {}, "data: no rows in {file}"),
    "an empty compressed file": ("rows.jsonl.gz", gzip.compress(b""), {}, "data: no rows in {file}"),
    "a CSV header alone": ("rows.csv", b"messages\n", {}, "data: no rows in {file}"),
    "an unknown kind": (
        "rows.txt",
        GOOD,
        {},
        "{file}: unknown file type; data files are .jsonl, .json, .parquet, .csv, .arrow "
        "(text files may be compressed: .gz, .bz2, .xz, .zst)",
    ),
    "an archive": ("rows.zip", b"PK", {}, "{file}: unknown file type; data files are ..."),
    "a compressed table": (
        "rows.parquet.gz",
        gzip.compress(b""),
        {},
        "{file}: unknown file type; data files are ...",
    ),
    "a broken line": (
        "rows.jsonl",
        GOOD + b"\n{broken\n",
        {},
        "{file}, line 2: not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "a torn line": ("rows.jsonl", GOOD + b"\n" + GOOD[:-9], {}, "{file}, line 2: not valid JSON: ..."),
    "a line that is no text": (
        "rows.jsonl",
        GOOD + b'\n{"messages": "\xff\xfe"}\n',
        {},
        "{file}, line 2: not valid JSON: ...",
    ),
    "a line of null bytes": ("rows.jsonl", GOOD + b"\n\0\0\0\0\n", {}, "{file}, line 2: not valid JSON: ..."),
    "a number of 5,000 digits": (
        "rows.jsonl",
        GOOD + b'\n{"id": ' + b"9" * 5000 + b"}",
        {},
        "{file}, line 2: not valid JSON: Exceeds the limit (4300 digits) for integer string conversion...",
    ),
    "brackets without end": ("rows.jsonl", GOOD + b"\n" + b"[" * 200_000, {}, "{file}, line 2: nested too deeply"),
    "UTF-16": ("rows.jsonl", UTF_16, {}, "{file}: UTF-16 text; save it as UTF-8"),
    "a torn array": ("rows.json", b"[" + GOOD + b",", {}, "{file}: not valid JSON: Expecting value: line 1 column ..."),
    "one object over several lines": (
        "rows.json",
        b'{\n"messages": []\n}',
        {},
        "{file}: a .json file must hold a list of rows, or one row per line",
    ),
    "an array of numbers": ("rows.json", b"[1, 2]", {}, "{file}, row 1: a row is a JSON object, this is int 1"),
    "an array in JSON lines": (
        "rows.jsonl",
        b"[" + GOOD + b"]",
        {},
        "{file}, line 1: a row is a JSON object, this is a list",
    ),
    "not compressed": ("rows.jsonl.gz", GOOD, {}, "{file}: cannot be read: Not a gzipped file (..."),
    "a torn gzip file": (
        "rows.jsonl.gz",
        gzip.compress(GOOD)[:-20],
        {},
        "{file}: cannot be read: Compressed file ended before the end-of-stream marker was reached",
    ),
    "a broken gzip file": (
        "rows.jsonl.gz",
        gzip.compress(GOOD)[:20] + b"xxxxxxxxxxxxxxxxxxxx",
        {},
        "{file}: cannot be read: Error -3 ...",
    ),
    "not bzip2": ("rows.jsonl.bz2", GOOD, {}, "{file}: cannot be read: Invalid data stream"),
    "a torn bzip2 file": (
        "rows.jsonl.bz2",
        bz2.compress(GOOD)[:-9],
        {},
        "{file}: cannot be read: Compressed file ended ...",
    ),
    "not xz": ("rows.jsonl.xz", GOOD, {}, "{file}: cannot be read: Input format not supported by decoder"),
    "a torn xz file": (
        "rows.jsonl.xz",
        lzma.compress(GOOD)[:-9],
        {},
        "{file}: cannot be read: Compressed file ended ...",
    ),
    "not zstd": ("rows.jsonl.zst", GOOD, {}, "{file}: cannot be read: ZSTD decompress failed: ..."),
    "a torn zstd file": (
        "rows.jsonl.zst",
        pyarrow.compress(GOOD * 9, codec="zstd", asbytes=True)[:-9],
        {},
        "{file}: cannot be read: ...",
    ),
    "no Parquet file": ("rows.parquet", b"no table at all", {}, "{file}: cannot be read: ..."),
    "an empty Parquet file": ("rows.parquet", b"", {}, "{file}: cannot be read: ..."),
    "no Arrow file": ("rows.arrow", b"no table at all", {}, "{file}: cannot be read: ..."),
    "a CSV file with a column twice": (
        "rows.csv",
        b"prompt,completion,prompt\na,b,c\n",
        {},
        "{file}: two columns are named 'prompt'; rename one",
    ),
    "a ragged CSV file": (
        "rows.csv",
        b"prompt,completion\na,b\nc,d,e\n",
        {},
        "{file}, row 2: 3 cells, but the header has 2; fix the row",
    ),
    "a CSV quote without end": (
        "rows.csv",
        b'prompt,completion\n"a,b\n',
        {},
        "{file}: cannot be read: unexpected end of data",
    ),
    "CSV in Latin-1": (
        "rows.csv",
        b"prompt,completion\ncaf\xe9,b\n",
        {},
        "{file}: cannot be read: 'utf-8' codec can't decode ...",
    ),
    "CSV with an empty answer": (
        "rows.csv",
        b"prompt,completion\na,b\nc,\n",
        {},
        "{file}, row 2: no 'completion' column (found: prompt); name yours in data.columns",
    ),
    "another shape than the recipe says": (
        "rows.jsonl",
        GOOD,
        {"format": "instruction"},
        "{file}, line 1: no 'instruction' column (found: messages); name yours in data.columns",
    ),
    "a later row of another shape": (
        "rows.jsonl",
        GOOD + b'\n{"prompt": "a", "completion": "b"}\n',
        {},
        "{file}, line 2: no 'messages' column (found: prompt, completion); name yours in data.messages or data.columns",
    ),
    "a column that no row has": (
        "rows.jsonl",
        GOOD,
        {"group_by": "question"},
        "data.group_by: no row has a column 'question' (found: messages)",
    ),
    "one row to hold back and train on": (
        "rows.jsonl",
        GOOD,
        {"eval_fraction": 0.5},
        "data.eval_fraction: 0.5 of 1 rows leaves nothing to train on; lower it, or name other data in data.eval",
    ),
}


def check(message: str, expected: str) -> None:
    assert "\n" not in message
    if expected.endswith("..."):
        assert message.startswith(expected.removesuffix("..."))
    else:
        assert message == expected


def read_all(section: DataSection) -> None:
    data, _ = open_training_data(section, seed=1)
    assert isinstance(data, Mixture)
    for index in range(len(data)):
        data.conversation(index)


def first_error(path: Path, keys: dict[str, Any]) -> str:
    """What opening the file and reading all of its rows says."""
    section = DataSection.model_validate({"train": str(path), **keys})
    with pytest.raises(UserError) as error:
        read_all(section)
    return str(error.value)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    row, message, words = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, json.dumps(row).encode()]))
    check(first_error(path, {}), f"{path}, line 3{message}: {words}")


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_a_bad_row_of_another_shape_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    shape, row, message, words = BAD_SHAPES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    check(first_error(path, {"format": shape}), f"{path}, line 1{message}: {words}")


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, content, keys, words = BAD_FILES[name]
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    check(first_error(path, keys), words.replace("{file}", str(path)))


def test_the_tables_hold_at_least_forty_kinds() -> None:
    assert len({**BAD_ROWS, **BAD_SHAPES, **BAD_FILES}) == len(BAD_ROWS) + len(BAD_SHAPES) + len(BAD_FILES) >= 40


@pytest.mark.parametrize("name", ["unknown role", "a broken line"])
def test_the_command_line_shows_it_and_exits_with_2(
    tmp_path: Path, name: str, mtr: Callable[..., tuple[int, str, str]], write_recipe: Callable[..., Path]
) -> None:
    bad = json.dumps(BAD_ROWS[name][0]).encode() if name in BAD_ROWS else b"{broken"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + bad)
    code, out, err = mtr("inspect", write_recipe(data={"train": str(path)}), "--index", 1)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {path}, line 2")

"""Data files: missing, empty, torn, in another encoding or format than they say; and changed while they are read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.hostile import (
    Attempt,
    Ended,
    Place,
    Prepare,
    after,
    done,
    in_turn,
    inspect,
    json_lines,
    refused,
    stopped,
    train,
    until,
)
from support.rows import ANSWER, USER, chat, conversation_row

GOOD = json.dumps(conversation_row()) + "\n"
CSV = "prompt,completion\nHow many?,Seven.\n"


def content(name: str, text: str | bytes, **data: Any) -> Prepare:
    """Training on a file of this name and content."""
    return after(lambda place: place.write(name, text), data={"train": f"{{place}}/{name}", **data})


def made(name: str, make: Callable[[Path], object], **data: Any) -> Prepare:
    """Training on a path that is made like this."""

    def prepare(place: Place) -> Sequence[object]:
        make(place / name)
        return train(data={"train": f"{{place}}/{name}", **data})(place)

    return prepare


def parquet(columns: dict[str, list[Any]]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return make


def torn(make: Callable[[Path], object], keep: float = 0.6) -> Callable[[Path], object]:
    """The first part of a file."""

    def cut(path: Path) -> None:
        make(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return cut


def saved_by_datasets(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([conversation_row()]).save_to_disk(str(path))


def damaged_arrow(name: str, text: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        saved_by_datasets(path)
        (path / name).write_text(text)

    return make


def splits(text: str) -> Callable[[Path], object]:
    """A folder of splits, as `datasets` saves it, with this list of them."""

    def make(path: Path) -> None:
        path.mkdir()
        (path / "dataset_dict.json").write_text(text)

    return make


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def rows_are(number: int) -> Callable[[Place, Ended], None]:
    def holds(_: Place, ended: Ended) -> None:
        found = json_lines(ended)
        assert len(found) == number, f"{len(found)} rows instead of {number}"
        assert all(turn["trained"] for row in found for turn in row["turns"]), "a turn is not trained"

    return holds


def read(name: str, file: str, text: str | bytes, rows: int, **data: Any) -> Attempt:
    """A file that has to be read, with so many rows."""
    prepare = after(
        lambda place: place.write(file, text), inspect("--all", data={"train": f"{{place}}/{file}", **data})
    )
    return done(name, prepare, holds=rows_are(rows))


OPENED = (
    refused("an empty file", content("rows.jsonl", ""), "rows.jsonl", "no rows"),
    refused("only blank lines", content("rows.jsonl", "\n  \n\t\n"), "rows.jsonl", "no rows"),
    refused("an empty list", content("rows.json", "[]"), "rows.json"),
    refused("an empty folder", made("data", Path.mkdir), "data", "no data file"),
    refused(
        "a folder of other files",
        after(lambda p: p.write("data/notes.txt", "x"), data={"train": "{place}/data"}),
        "no data file",
    ),
    refused("a folder whose name ends like a file's", made("rows2.jsonl", Path.mkdir), "rows2.jsonl"),
    refused("a dangling link", made("link.jsonl", lambda p: p.symlink_to("nowhere.jsonl")), "link.jsonl"),
    refused("a link to itself", made("link.jsonl", lambda p: p.symlink_to(p)), "link.jsonl"),
    refused("a pipe that nobody writes to", made("pipe.jsonl", os.mkfifo), "pipe.jsonl", seconds=2),
    refused("a socket", made("socket.jsonl", listen), "socket.jsonl"),
    refused("the empty device", made("null.jsonl", lambda p: p.symlink_to("/dev/null")), "null.jsonl"),
    refused("an unknown ending", content("rows.txt", GOOD), "rows.txt", "unknown file type"),
    refused("a zip file", content("rows.zip", b"PK\x03\x04"), "rows.zip", "unknown file type"),
    refused("a compressed Parquet", content("rows.parquet.gz", b"x"), "rows.parquet.gz", "unknown file type"),
    refused("no ending, in this folder", content("rows", GOOD), "rows"),
    refused("UTF-16", content("rows.jsonl", GOOD.encode("utf-16")), "rows.jsonl", "UTF-16"),
    refused("Latin-1", content("rows.jsonl", GOOD.replace("coins", "cöins").encode("latin-1")), "rows.jsonl, line 1"),
    refused("NUL bytes", content("rows.jsonl", GOOD.encode() + b"\0" * 4096), "rows.jsonl, line 2"),
    refused("only NUL bytes, as after a power cut", content("rows.jsonl", b"\0" * 4096), "rows.jsonl"),
    refused("line ends of old Macs", content("rows.jsonl", (GOOD + GOOD).replace("\n", "\r")), "rows.jsonl, line 1"),
    refused("a Parquet by another name", made("rows.jsonl", parquet({"x": [1]})), "rows.jsonl"),
    refused("JSON lines in Parquet's name", content("rows.parquet", GOOD), "rows.parquet", "cannot be read"),
    refused("JSON lines in gzip's name", content("rows.jsonl.gz", GOOD), "rows.jsonl.gz", "cannot be read"),
    refused("gzip in the plain name", content("rows.jsonl", gzip.compress(GOOD.encode())), "rows.jsonl"),
    refused("gzip of nothing", content("rows.jsonl.gz", gzip.compress(b"")), "rows.jsonl.gz", "no rows"),
    refused("half a gzip", content("rows.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-40]), "rows.jsonl.gz"),
    refused(
        "a gzip with a flipped bit",
        content("rows.jsonl.gz", gzip.compress(GOOD.encode())[:-6] + b"\0" * 6),
        "rows.jsonl.gz",
    ),
    refused("half a bzip2", content("rows.jsonl.bz2", bz2.compress(GOOD.encode() * 99)[:-40]), "rows.jsonl.bz2"),
    refused("half an xz", content("rows.jsonl.xz", lzma.compress(GOOD.encode() * 99)[:-40]), "rows.jsonl.xz"),
    refused("no zstd", content("rows.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 40), "rows.jsonl.zst"),
    refused("a list that ends early", content("rows.json", f"[{GOOD},"), "rows.json", "not valid JSON"),
    refused("a list of lists", content("rows.json", "[[1], [2]]"), "rows.json, row 1", "JSON object"),
    refused(
        "one object over several lines", content("rows.json", json.dumps(conversation_row(), indent=1)), "rows.json"
    ),
    refused("a list in a .jsonl file", content("rows.jsonl", f"[{GOOD}]"), "rows.jsonl"),
    refused("a CSV without rows", content("rows.csv", "prompt,completion\n"), "rows.csv", "no rows"),
    refused("an empty CSV", content("rows.csv", ""), "rows.csv"),
    refused("a ragged CSV", content("rows.csv", f"{CSV}a,b,c\n"), "rows.csv, row 2", "3 cells"),
    refused("a CSV with an open quote", content("rows.csv", f'{CSV}"a,b\n'), "rows.csv"),
    refused("a CSV in Latin-1", content("rows.csv", f"{CSV}ä,ö\n".encode("latin-1")), "rows.csv"),
    refused("a CSV with an empty answer", content("rows.csv", f"{CSV}a,\n"), "rows.csv, row 2", "'completion'"),
    refused(
        "a CSV with a column twice",
        content("rows.csv", "prompt,completion,completion\na,b,c\n"),
        "rows.csv",
        "'completion'",
    ),
    refused("a CSV with semicolons", content("rows.csv", CSV.replace(",", ";")), "rows.csv, row 1"),
    refused("an empty Parquet", content("rows.parquet", b""), "rows.parquet", "cannot be read"),
    refused("half a Parquet", made("rows.parquet", torn(parquet({"x": list(range(999))}))), "rows.parquet"),
    refused("a Parquet without rows", made("rows.parquet", parquet({"messages": []})), "rows.parquet", "no rows"),
    refused("a Parquet without columns", made("rows.parquet", parquet({})), "rows.parquet"),
    refused("a Parquet of numbers", made("rows.parquet", parquet({"messages": [1, 2]})), "rows.parquet, row 1"),
    refused("a Parquet of bytes", made("rows.parquet", parquet({"messages": [b"\xff\xfe"]})), "rows.parquet, row 1"),
    refused(
        "a Parquet with a hole",
        made("rows.parquet", parquet({"messages": [[USER, ANSWER], None]})),
        "rows.parquet, row 2",
    ),
    refused("no Arrow file", content("rows.arrow", "no table"), "rows.arrow"),
    refused("an Arrow folder without its table", made("saved", damaged_arrow("state.json", "{}")), "saved"),
    refused("an Arrow folder whose state is torn", made("saved", damaged_arrow("state.json", "{")), "saved"),
    refused("an Arrow folder whose state is a list", made("saved", damaged_arrow("state.json", "[]")), "saved"),
    refused("an Arrow folder whose info is torn", made("saved", damaged_arrow("dataset_info.json", "{")), "saved"),
    refused(
        "an Arrow folder whose table is torn", made("saved", damaged_arrow("data-00000-of-00001.arrow", "x")), "saved"
    ),
    refused(
        "splits without theirs",
        made("saved", splits('{"splits": ["test"]}')),
        "saved",
    ),
    refused(
        "splits that are no JSON",
        made("saved", splits("{")),
        "saved",
    ),
    refused(
        "one of three files is broken",
        after(
            lambda p: [p.write(f"data/{n}.jsonl", GOOD) for n in "ab"] and p.write("data/c.parquet", "x"),
            data={"train": "{place}/data"},
        ),
        "c.parquet",
    ),
    refused(
        "a broken file for the evaluation",
        after(lambda p: p.write("eval.jsonl.gz", "x"), data={"eval": "{place}/eval.jsonl.gz"}),
        "eval.jsonl.gz",
    ),
    refused("the name of a file with escape codes", content("\x1b[31mrows.jsonl", "{"), "rows.jsonl, line 1"),
    refused("the name of a file in two lines", content("ro\nws.jsonl", "{"), "line 1", "not valid JSON"),
    refused(
        "the name of a file too long for one", train(data={"train": "{place}/" + "x" * 300 + ".jsonl"}), "xxx.jsonl"
    ),
    refused("a path of 3,000 folders", train(data={"train": "{place}/" + "a/" * 3_000 + "rows.jsonl"}), "rows.jsonl"),
    refused("a glob over everything", train(data={"train": "{place}/home/**/*.jsonl"}), "*.jsonl"),
)

READ = (
    read("a byte order mark", "rows.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), 1),
    read("DOS line ends", "rows.jsonl", (GOOD * 2).replace("\n", "\r\n"), 2),
    read("no line end at the end", "rows.jsonl", (GOOD * 2).rstrip(), 2),
    read("blank lines between", "rows.jsonl", f"\n{GOOD}\n \n{GOOD}\n", 2),
    read("one row per line in a .json file", "rows.json", GOOD * 2, 2),
    read("two gzip files in a row", "rows.jsonl.gz", gzip.compress(GOOD.encode()) * 2, 2),
    read("a CSV with line breaks in cells", "rows.csv", 'prompt,completion\n"a\nb","c\n\nd"\n', 1),
    read("a name with the signs of a glob", "rows[1].jsonl", GOOD, 1),
    read("a name with spaces and quotes", "my 'rows' \"here\".jsonl", GOOD, 1),
    read("a name in another script", "строки-行.jsonl", GOOD, 1),
    read("one long line", "rows.jsonl", json.dumps(chat({"role": "user", "content": "x " * 100}, ANSWER)), 1),
)


def edited(change: Callable[[Path], object]) -> Callable[[Place, int], None]:
    """The data is changed once the run has done its first step."""

    def meanwhile(place: Place, _: int) -> None:
        until(lambda: (place.run / "metrics.jsonl").exists())
        change(place / "rows.jsonl")

    return meanwhile


def long_run(place: Place) -> Sequence[object]:
    """Many steps on rows of one length, so that any of them can stand in another's place."""
    place.rows(*(chat(USER, {**ANSWER, "content": f"Ana has {i} coins now."}) for i in range(10, 40)))
    return train(training={"max_steps": 100_000, "save_steps": None})(place)


def swap_lines(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def change_numbers(path: Path) -> None:
    """Another text of the same length, with the old time."""
    before = path.stat()
    path.write_text(path.read_text().replace("Ana", "Eva"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


MEANWHILE = tuple(
    stopped(
        f"while it is read: {name}",
        long_run,
        "rows.jsonl",
        meanwhile=edited(change),
        writes=("run", "rows.jsonl"),
    )
    for name, change in {
        "rows in another order": swap_lines,
        "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
        "emptied": lambda path: os.truncate(path, 0),
        "removed": lambda path: path.unlink(),
        "replaced by a folder": in_turn(Path.unlink, Path.mkdir),
        "other words of the same length, with the old time": change_numbers,
    }.items()
)

ATTEMPTS = (*OPENED, *READ, *MEANWHILE)

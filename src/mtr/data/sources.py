"""Where rows are stored: files, folders, the Hub. Every kind gives rows by index, and the file and line of each.

Memory: a JSON-lines file takes 8 bytes per row, whatever its size; a compressed one is held in memory, compressed; a
JSON array, a Parquet or a CSV file is read into memory; an Arrow folder is memory-mapped.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mtr.errors import RowError, UserError, one_line
from mtr.recipe.sections import Source

Ints = NDArray[np.int64]
_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 24  # bytes read at a time when looking for lines
_BLOCK = 1 << 18  # bytes of text that are compressed together, and decompressed to read one row
_SPACE = np.frombuffer(b"\t\n\v\f\r ", np.uint8)


class Rows(Protocol):
    """Rows with an index."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any:
        """
        Raises:
            RowError: the row cannot be parsed.
        """

    def where(self, index: int) -> str:
        """File and row, without reading it."""


class JsonLines:
    """A JSON-lines file, read by byte offsets. Every row has exactly the fields that its line has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._offsets, self._lines = _line_starts(file)

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> Any:
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[index]))
            line = file.readline()
        return _parse_json(line, self.where(index))

    def where(self, index: int) -> str:
        return f"{self._path}, line {1 + (index if self._lines is None else self._lines[index])}"


class CompressedLines:
    """A compressed JSON-lines file, held in blocks of lines that are compressed again, for random access."""

    def __init__(self, path: Path, file: Any) -> None:
        import pyarrow

        self._path = path
        self._blocks: list[tuple[bytes, int]] = []
        places: list[tuple[int, int, int]] = []
        number = 0
        for text in _blocks_of_lines(file):
            at = 0
            for line in io.BytesIO(text):
                if line.strip():
                    places.append((len(self._blocks), at, number))
                at += len(line)
                number += 1
            self._blocks.append((pyarrow.compress(text, codec="zstd", asbytes=True), len(text)))
        self._places = np.array(places, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int) -> Any:
        import pyarrow

        block, at, _ = self._places[index]
        text = pyarrow.decompress(*self._blocks[block], codec="zstd", asbytes=True)
        return _parse_json(text[at:].partition(b"\n")[0], self.where(index))

    def where(self, index: int) -> str:
        return f"{self._path}, line {1 + self._places[index, 2]}"


class Listed:
    """The rows of a JSON array, held in memory."""

    def __init__(self, path: Path, rows: Sequence[Any]) -> None:
        self._path = path
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Any:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self._path}, row {index + 1}"


class Table:
    """An Arrow table. Its columns are typed, so fields that a row does not have are None: they are removed."""

    def __init__(self, name: str, table: Any) -> None:
        self._name = name
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> Any:
        return without_none(self._table[index])

    def where(self, index: int) -> str:
        return f"{self._name}, row {index + 1}"


def open_source(source: Source, streaming: bool) -> list[Any]:
    """The files of one source, each as Rows; or a Hub stream.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    path = Path(source.path)
    if any(c in source.path for c in "*?[") and not path.exists():
        base = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(p for p in base.glob(str(path.relative_to(path.anchor))) if p.is_file())
        if not files:
            raise UserError(f"data: no file matches {source.path}")
        return [_open_file(file) for file in files]
    if path.is_file():
        return [_open_file(path)]
    if path.is_dir():
        return _open_folder(path, source.split)
    if path.is_absolute() or source.path.startswith((".", "~")) or _suffix(path) or source.path.count("/") > 1:
        raise UserError(f"data: no such file: {source.path}")
    return [_open_hub(source, streaming)]


def _open_folder(path: Path, split: str) -> list[Any]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return [_open_arrow(path, split)]
    files = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) and not p.name.startswith("."))
    if not files:
        raise UserError(f"{path}: no data file in this folder ({', '.join(_SUFFIXES)})")
    return [_open_file(file) for file in files]


def _open_arrow(path: Path, split: str) -> Table:
    """A folder saved by `datasets`: one data set, or several splits."""
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable Arrow folder: {one_line(error)}") from None
    if isinstance(saved, Dataset):
        return Table(str(path), saved)
    if split not in saved:
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(saved)}")
    return Table(f"{path} ({split})", saved[split])


def _open_file(path: Path) -> Rows:
    suffix = _suffix(path)
    packed = path.suffix in _COMPRESSED
    try:
        if suffix in (".jsonl", ".json"):
            return _open_json(path, suffix, packed)
        if suffix == ".csv":
            return Listed(path, _read_csv(path))
        if suffix in (".parquet", ".arrow") and not packed:
            return Table(str(path), _read_table(path, suffix))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    kinds = ", ".join(_SUFFIXES)
    raise UserError(
        f"{path}: unknown file type; data files are {kinds} (text files may be compressed: {', '.join(_COMPRESSED)})"
    )


def _open_json(path: Path, suffix: str, packed: bool) -> Rows:
    with _unpacked(path) as file:
        head = file.read(_BLOCK)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: UTF-16 text; save it as UTF-8")
        content = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if content[:1] == b"[" and suffix == ".json":
            rows = _parse_json(content + file.read(), str(path))
            return Listed(path, rows)
    if suffix == ".json" and content[:1] == b"{" and content.splitlines()[0].strip() == b"{":
        raise UserError(f"{path}: a .json file must hold a list of rows, or one row per line")
    if not packed:
        return JsonLines(path)
    with _unpacked(path) as file:
        return CompressedLines(path, file)


def _unpacked(path: Path) -> Any:
    """The file, opened in binary mode and decompressed."""
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rb")


def _read_table(path: Path, suffix: str) -> Any:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        if suffix == ".arrow":
            return Dataset.from_file(str(path))
        return Dataset(pyarrow.parquet.read_table(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def _read_csv(path: Path) -> list[dict[str, str]]:
    """Every cell is text, and an empty one is absent: type inference would turn the answer 42 into a number."""
    csv.field_size_limit(2**31 - 1)
    with _unpacked(path) as file:
        text = file.read()
    try:
        lines = csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True)
        header = next(lines, [])
        rows = []
        for number, cells in enumerate(filter(None, lines), 1):
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, row {number}: {len(cells)} cells, but the header has {len(header)}; fix the row"
                )
            rows.append({name: cell for name, cell in zip(header, cells, strict=True) if cell})
        return rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def _open_hub(source: Source, streaming: bool) -> Any:
    from datasets import load_dataset

    try:
        data = load_dataset(source.path, source.name, split=source.split, revision=source.revision, streaming=streaming)
    except Exception as error:  # the Hub client raises its own kinds
        raise UserError(
            f"data: {source.path} is not a local file, and loading it from the Hub failed: {one_line(error)}"
        ) from None
    return data if streaming else Table(source.path, data)


def _suffix(path: Path) -> str | None:
    name = path.name.removesuffix(path.suffix) if path.suffix in _COMPRESSED else path.name
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)


def _line_starts(file: Any) -> tuple[Ints, Ints | None]:
    """Byte offset of each line that is not blank, and its number counted from 0, or None if no line is blank.

    One pass over the file in large reads: of the text only the first byte of each line is kept, which tells whether
    the line can be blank at all.
    """
    starts, firsts = [], []
    at, opens = 0, True  # whether the next chunk opens a line
    while chunk := file.read(_CHUNK):
        text = np.frombuffer(chunk, np.uint8)
        breaks = np.flatnonzero(text == 10)
        inside = np.concatenate([[0] if opens else [], breaks + 1]).astype(np.int64)
        opens = bool(text[-1] == 10)
        inside = inside[: len(inside) - opens]
        starts.append(inside + at)
        firsts.append(text[inside])
        at += len(chunk)
    if not starts:
        return np.empty(0, np.int64), None
    offsets = np.concatenate(starts)
    blank = []
    for i in np.flatnonzero(np.isin(np.concatenate(firsts), _SPACE)):
        file.seek(int(offsets[i]))
        if not file.readline().strip():
            blank.append(i)
    if not blank:
        return offsets, None
    kept = np.delete(np.arange(len(offsets)), blank)
    return offsets[kept], kept


def _blocks_of_lines(file: Any) -> Iterator[bytes]:
    """The text in blocks of about _BLOCK bytes that end at the end of a line."""
    rest: list[bytes] = []
    while chunk := file.read(_BLOCK):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            yield b"".join([*rest, head, newline])
            rest = []
        rest.append(tail)
    if last := b"".join(rest):
        yield last


def _parse_json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RowError(where, "not valid JSON", f": {error}") from None
    except RecursionError:
        raise RowError(where, "nested too deeply") from None


def without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value

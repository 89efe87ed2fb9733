"""Where rows are stored: files, folders, the Hub. Every kind gives rows by index, and the file and line of each.

Memory: a JSON-lines file takes 12 bytes per row, whatever its size; a compressed one is held in memory, compressed; a
JSON array, a Parquet or a CSV file is read into memory; an Arrow folder is memory-mapped.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any, Protocol

from mtr.data.lines import BLOCK, CompressedLines, JsonLines
from mtr.data.origin import Origin
from mtr.data.tables import Listed, Table, read_array, read_csv, read_parquet
from mtr.errors import UserError, one_line
from mtr.files import checksum
from mtr.recipe.data_files import (
    COMPRESSED,
    check_kind,
    check_source,
    data_suffix,
    files_in,
    files_matching,
    is_pattern,
    is_saved_by_datasets,
)
from mtr.recipe.sections import Source


class Rows(Protocol):
    """Rows with an index."""

    @property
    def origin(self) -> Origin: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any:
        """
        Raises:
            RowError: the row cannot be parsed.
            UserError: the rows are no longer those that were opened.
        """

    def where(self, index: int) -> str:
        """File and row, without reading it."""


def open_source(source: Source, streaming: bool) -> list[Any]:
    """The files of one source, each as Rows; or a Hub stream.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    check_source(source.path)
    path = Path(source.path)
    if is_pattern(source.path) and not path.exists():
        return [_open_file(file) for file in sorted(files_matching(source.path))]
    if path.is_file():
        return [_open_file(path)]
    if path.is_dir():
        return _open_folder(path, source.split)
    return [_open_hub(source, streaming)]


def _open_folder(path: Path, split: str) -> list[Any]:
    if is_saved_by_datasets(path):
        return [_open_arrow(path, split)]
    return [_open_file(file) for file in sorted(files_in(path))]


def _open_arrow(path: Path, split: str) -> Table:
    """A folder saved by `datasets`: one data set, or several splits."""
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # of many kinds, as its JSON files may hold anything
        raise UserError(f"{path}: not a readable Arrow folder: {one_line(error)}") from None
    if isinstance(saved, Dataset):
        return _mapped(str(path), saved, saved._fingerprint)
    if split not in saved:
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(saved)}")
    return _mapped(f"{path} ({split})", saved[split], saved[split]._fingerprint)


def _mapped(name: str, saved: Any, own: str | None) -> Table:
    return Table(name, saved, Origin.of_mapped((file["filename"] for file in saved.cache_files), own))


def _open_file(path: Path) -> Rows:
    try:
        check_kind(path)
        return _read_file(path, data_suffix(path), packed=path.suffix in COMPRESSED)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def _read_file(path: Path, suffix: str | None, packed: bool) -> Rows:
    if suffix in (".jsonl", ".json"):
        return _open_json(path, suffix, packed)
    if suffix == ".csv":
        origin = Origin.of_file(path, checksum(path))
        with _unpacked(path) as file:
            return Listed(path, read_csv(path, file), origin)
    if suffix == ".parquet":
        return Table(str(path), read_parquet(path), Origin.of_file(path, checksum(path)))
    return _mapped(str(path), _map_arrow(path), None)


def _map_arrow(path: Path) -> Any:
    from datasets import Dataset

    try:
        return Dataset.from_file(str(path))
    except Exception as error:  # of many kinds, as the file may hold anything
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def _open_json(path: Path, suffix: str, packed: bool) -> Rows:
    with _unpacked(path) as file:
        head = file.read(BLOCK)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: UTF-16 text; save it as UTF-8")
    content = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if content[:1] == b"[" and suffix == ".json":
        origin = Origin.of_file(path, checksum(path))
        with _unpacked(path) as file:
            return Listed(path, read_array(path, file), origin)
    if suffix == ".json" and content[:1] == b"{" and content.splitlines()[0].strip() == b"{":
        raise UserError(f"{path}: a .json file must hold a list of rows, or one row per line")
    if not packed:
        return JsonLines(path)
    with _unpacked(path) as file:
        return CompressedLines(path, file)


def _unpacked(path: Path) -> io.BufferedReader:
    """The file, opened in binary mode and decompressed."""
    if path.suffix == ".zst":
        import pyarrow

        raw = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    else:
        opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
        raw = opener(path, "rb")
    return io.BufferedReader(raw, BLOCK)


def _open_hub(source: Source, streaming: bool) -> Any:
    from datasets import load_dataset

    try:
        data = load_dataset(source.path, source.name, split=source.split, revision=source.revision, streaming=streaming)
    except Exception as error:  # the Hub client raises its own kinds
        raise UserError(
            f"data: {source.path} is not a local file, and loading it from the Hub failed: {one_line(error)}"
        ) from None
    return data if streaming else _mapped(source.path, data, data._fingerprint)

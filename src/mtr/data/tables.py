"""Rows that are held in memory or mapped into it: JSON arrays, CSV, Parquet and Arrow.

What is read into memory is bounded by the machine's memory before it is read or while it is.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mtr.data.json_text import MOST_ROW, NestedTooDeeplyError, parse_json
from mtr.data.origin import Origin
from mtr.errors import RowError, UserError, one_line

_MOST_EXPANDED = 100
_SMALL = 1 << 28
"""Compressed text that is read whole may be so many times larger than its file, or of so many bytes."""
_TEXT_SHARE = 4
"""Text that is read whole takes about four times its size in memory, while its rows are made."""


class Listed:
    """The rows of a JSON array or a CSV file, held in memory."""

    def __init__(self, path: Path, rows: Sequence[Any], origin: Origin) -> None:
        self._path = path
        self._rows = rows
        self.origin = origin

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Any:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self._path}, row {index + 1}"


class Table:
    """An Arrow table. Its columns are typed, so fields that a row does not have are None: they are removed."""

    def __init__(self, name: str, table: Any, origin: Origin) -> None:
        self._name = name
        self._table = table
        self.origin = origin

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> Any:
        """
        Raises:
            RowError: the table does not hold what its types say.
            UserError: a file of the table was written over since it was opened.
        """
        if (changed := self.origin.find_change()) is not None:
            raise UserError(
                f"{changed} was changed while it was used; put it back as it was, and a run can continue with "
                "--resume; or start over with the new data"
            )
        try:
            return without_none(self._table[index])
        except Exception as error:  # of many kinds: bytes that are no text, dates out of range, damaged offsets
            raise RowError(self.where(index), "the row cannot be read", f": {one_line(error)}") from None

    def where(self, index: int) -> str:
        return f"{self._name}, row {index + 1}"


def read_array(path: Path, file: BinaryIO) -> Any:
    """The rows of a JSON array.

    Args:
        file: gives the text of `path`, decompressed.

    Raises:
        UserError: not valid JSON, or too large.
    """
    most, expanded = memory() // _TEXT_SHARE, max(_SMALL, _MOST_EXPANDED * path.stat().st_size)
    text = file.read(min(most, expanded) + 1)
    if len(text) > most:
        raise _too_large(path, "a JSON array")
    if len(text) > expanded:
        raise UserError(
            f"{path}: its text is more than {_MOST_EXPANDED} times larger than the file; if that is right, decompress "
            "it, or write it as JSON lines (one row a line), which are read row by row"
        )
    try:
        return parse_json(text)
    except NestedTooDeeplyError as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_csv(path: Path, file: BinaryIO) -> list[dict[str, str]]:
    """Every cell is text, and an empty one is absent: type inference would turn the answer 42 into a number.

    Raises:
        UserError: not UTF-8, not a table, or too large.
    """
    csv.field_size_limit(MOST_ROW)
    try:
        lines = csv.reader(_csv_lines(path, file), strict=True)
        header = next(lines, [])
        if twice := [name for name, times in Counter(header).items() if times > 1]:
            raise UserError(f"{path}: two columns are named {twice[0]!r}; rename one")
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


def _csv_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    left, encoding, number = memory() // _TEXT_SHARE, "utf-8-sig", 0
    while line := file.readline(MOST_ROW + 1):
        number, left = number + 1, left - len(line)
        if len(line) > MOST_ROW:
            raise UserError(f"{path}, line {number}: longer than {MOST_ROW >> 20} MiB; split or remove the row")
        if left < 0:
            raise _too_large(path, "a CSV file")
        yield from io.StringIO(line.decode(encoding), newline="")
        encoding = "utf-8"


def _too_large(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: {what} is read into memory whole, and this machine's memory ({memory() / 2**30:.1f} GiB) does not "
        "allow that; write it as JSON lines (one row a line), which are read row by row"
    )


def read_parquet(path: Path) -> Any:
    """A Parquet file as a data set in memory.

    Raises:
        UserError: not a Parquet file, a damaged one, or too large.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    most = memory() // 2
    try:
        file = pyarrow.parquet.ParquetFile(path)
        batches, size = [], 0
        for batch in file.iter_batches(batch_size=1024):
            size += batch.nbytes
            if size > most:
                raise _too_large(path, "a Parquet file")
            batches.append(batch)
        table = pyarrow.Table.from_batches(batches, file.schema_arrow)
        table.validate(full=True)
        return Dataset(table)
    except UserError:
        raise
    except Exception as error:  # of many kinds: a damaged file, columns with the same name, metadata that is wrong
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def memory() -> int:
    """Bytes of memory that this machine, or this container, has."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(most, int(text)) if text.isdigit() else most


def without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value

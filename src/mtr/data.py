"""Sources of rows: where they lie, how they mix, and in which order an epoch takes them.

Local rows have an index, so the position in the data is a number: the order of an epoch is a permutation seeded by
(seed, epoch), and any step can be built from its number alone, by any process, in any worker. Hub streams have no
index; they are read in order and replayed on resume.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mtr.conversation import Conversation, parse_row
from mtr.errors import UserError
from mtr.layout import Ints
from mtr.recipe import DataSection, Source

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
_CHUNK = 1 << 24  # bytes read at a time while counting lines


class Rows(Protocol):
    """Rows with an index."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any: ...

    def where(self, index: int) -> str: ...


class JsonLines:
    """A JSON-lines file by byte offsets: memory is 8 bytes a row. Every row keeps exactly the fields it has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets, self._lines = _line_starts(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> Any:
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[index]))
            line = file.readline()
        return _parse_json(line, self.where(index))

    def where(self, index: int) -> str:
        return f"{self._path}, line {self._lines[index] + 1}"


class Listed:
    """Rows held in memory, each with its name: a JSON array, or the lines of a compressed file."""

    def __init__(self, path: Path, rows: Sequence[tuple[str, Any]]) -> None:
        self._path = path
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Any:
        row = self._rows[index][1]
        return _parse_json(row, self.where(index)) if isinstance(row, bytes) else row

    def where(self, index: int) -> str:
        return f"{self._path}, {self._rows[index][0]}"


class Table:
    """An Arrow table. Its columns are typed, so absent fields come back as None: they are taken out again."""

    def __init__(self, name: str, table: Any) -> None:
        self._name = name
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> Any:
        return _without_none(self._table[index])

    def where(self, index: int) -> str:
        return f"{self._name}, row {index + 1}"


@dataclass(frozen=True)
class Mixture:
    """Sources side by side, each with its weight. Rows are numbered through all of them, in file order."""

    sources: tuple[tuple[Rows, float], ...]
    messages: str
    tools: str

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self.sources)

    def conversation(self, index: int) -> Conversation:
        """
        Raises:
            UserError: the row is bad, or there is none of this number.
        """
        for rows, _ in self.sources:
            if 0 <= index < len(rows):
                return parse_row(rows.row(index), rows.where(index), self.messages, self.tools)
            index -= len(rows)
        raise UserError(f"the data has {len(self)} rows, counted from 0")

    def where(self, index: int) -> str:
        """File and row, without reading it."""
        for rows, _ in self.sources:
            if index < len(rows):
                return rows.where(index)
            index -= len(rows)
        return f"row {index}"

    def epoch(self, epoch: int, seed: int, shuffle: bool) -> Ints:
        """Row numbers of one epoch: each source as often as its weight says."""
        rng = np.random.default_rng((seed, epoch))
        start, parts = 0, []
        for rows, weight in self.sources:
            numbers = np.arange(start, start + len(rows))
            whole, rest = int(weight), round((weight - int(weight)) * len(rows))
            parts += [numbers] * whole + [np.sort(rng.permutation(numbers)[:rest])]
            start += len(rows)
        order = np.concatenate(parts)
        return rng.permutation(order) if shuffle else order


@dataclass(frozen=True)
class Stream:
    """Hub data sets read as they come: no length, no index."""

    sources: tuple[tuple[Any, str, float], ...]
    messages: str
    tools: str
    buffer: int

    def conversations(self, epoch: int, seed: int, shuffle: bool) -> Iterator[Conversation]:
        from datasets import interleave_datasets

        streams = []
        for stream, name, _ in self.sources:
            named = stream.map(
                lambda row, index, name=name: {"mtr_where": f"{name}, row {index + 1}", **row},
                with_indices=True,
            )
            streams.append(named.shuffle(seed=seed + epoch, buffer_size=self.buffer) if shuffle else named)
        weights = [weight for *_, weight in self.sources]
        mixed = (
            streams[0]
            if len(streams) == 1
            else interleave_datasets(
                streams,
                [w / sum(weights) for w in weights],
                seed=seed + epoch,
                stopping_strategy="all_exhausted",
            )
        )
        for row in mixed:
            row = dict(_without_none(row))
            yield parse_row(row, row.pop("mtr_where"), self.messages, self.tools)


def open_data(data: DataSection, sources: Sequence[Source]) -> Mixture | Stream:
    """Open every source of `data.train` or `data.eval`.

    Raises:
        UserError: a source is missing, unreadable or empty.
    """
    opened = [(source, rows) for source in sources for rows in _open_source(source, data.streaming)]
    streams = [(rows, source.path, source.weight) for source, rows in opened if not hasattr(rows, "row")]
    if streams:
        if len(streams) < len(opened):
            raise UserError("data: Hub streams and local files cannot be mixed; set data.streaming to false")
        return Stream(tuple(streams), data.messages, data.tools, data.shuffle_buffer)
    mixture = Mixture(tuple((rows, source.weight) for source, rows in opened), data.messages, data.tools)
    if not len(mixture):
        raise UserError(f"data: no rows in {', '.join(source.path for source in sources)}")
    return mixture


def _open_source(source: Source, streaming: bool) -> list[Any]:
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
    """A folder that `datasets` saved: one data set, or several splits."""
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Arrow folder: {error}") from None
    if isinstance(saved, Dataset):
        return Table(str(path), saved)
    if split not in saved:
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(saved)}")
    return Table(f"{path} ({split})", saved[split])


def _open_file(path: Path) -> Rows:
    suffix = _suffix(path)
    try:
        if path.suffix == ".gz" and suffix in (".jsonl", ".json"):
            return _listed(gzip.decompress(path.read_bytes()), path)
        if suffix == ".jsonl":
            return JsonLines(path)
        if suffix == ".json":
            content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
            if content[:1] == b"[":
                return _listed(content, path)
            if content[:1] == b"{" and content.splitlines()[0].strip() == b"{":
                raise UserError(f"{path}: a .json file holds a list of rows, or one row a line")
            return JsonLines(path)
        if suffix in (".parquet", ".csv", ".arrow") and path.suffix != ".gz":
            return Table(str(path), _read_table(path))
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    raise UserError(f"{path}: unknown kind of file; data files are {', '.join(_SUFFIXES)}")


def _read_table(path: Path) -> Any:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet
    from datasets import Dataset

    try:
        if path.suffix == ".arrow":
            return Dataset.from_file(str(path))
        read = pyarrow.parquet.read_table if path.suffix == ".parquet" else pyarrow.csv.read_csv
        return Dataset(read(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _open_hub(source: Source, streaming: bool) -> Any:
    from datasets import load_dataset

    try:
        data = load_dataset(source.path, source.name, split=source.split, revision=source.revision, streaming=streaming)
    except Exception as error:  # the Hub client raises its own kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"data: {source.path} is no file here, and the Hub says: {reason}") from None
    return data if streaming else Table(source.path, data)


def _suffix(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)


def _line_starts(path: Path) -> tuple[Ints, Ints]:
    """Byte offset and line number of each line that is not blank."""
    starts, blank, at = [np.zeros(1, np.int64)], [], 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            breaks = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
            starts.append(breaks + at + 1)
            at += len(chunk)
    offsets = np.concatenate(starts)
    ends = np.append(offsets[1:], at)
    blank += np.flatnonzero(ends == offsets).tolist()
    with path.open("rb") as file:  # a blank line begins with white space
        content = np.memmap(file, np.uint8, mode="r") if at else np.empty(0, np.uint8)
        filled = np.flatnonzero(ends > offsets)
        for i in filled[np.isin(content[offsets[filled]], [9, 10, 13, 32])]:
            file.seek(int(offsets[i]))
            if not file.read(int(ends[i] - offsets[i])).strip():
                blank.append(i)
    kept = np.setdiff1d(np.arange(len(offsets)), np.array(blank, dtype=np.int64))
    return offsets[kept], kept


def _parse_json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


def _listed(content: bytes, path: Path) -> Listed:
    if content.lstrip()[:1] == b"[":
        rows = enumerate(_parse_json(content, str(path)), 1)
        return Listed(path, [(f"row {number}", row) for number, row in rows])
    lines = enumerate(content.split(b"\n"), 1)
    return Listed(path, [(f"line {number}", line) for number, line in lines if line.strip()])


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value

"""From the recipe's sources to data that can be read: opened, grouped, divided."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mtr.data.mixture import FIRST_ROWS, Mixture, Opened, read_row
from mtr.data.policy import Policy
from mtr.data.shapes import Reader
from mtr.data.sources import Ints, open_source
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.recipe.sections import DataSection, Source


def open_data(data: DataSection, sources: Sequence[Source]) -> Mixture | Stream:
    """Open every source of `data.train` or `data.eval`.

    Raises:
        UserError: a source is missing, unreadable or empty.
    """
    opened = [(source, rows) for source in sources for rows in open_source(source, data.streaming)]
    policy = Policy(data.filter, data.on_bad_row == "skip")
    streams = [(rows, source.path, source.weight) for source, rows in opened if not hasattr(rows, "row")]
    if streams:
        if len(streams) < len(opened):
            raise UserError("data: Hub streams and local files cannot be mixed; set data.streaming to false")
        readers = tuple(_reader(data, source) for source, _ in opened)
        return Stream(tuple(streams), readers, policy, data.shuffle_buffer)
    files = []
    for source, rows in opened:
        reader = _reader(data, source)
        if reader.shape is None:
            reader = reader.told_by(read_row(rows, i) for i in range(min(len(rows), FIRST_ROWS)))
        name = rows.where(0).rpartition(", ")[0] if len(rows) else source.path
        files.append(Opened(rows, name, source.weight, reader))
    mixture = Mixture(tuple(files), policy)
    if not len(mixture):
        raise UserError(f"data: no rows in {', '.join(source.path for source in sources)}")
    return mixture


def _reader(data: DataSection, source: Source) -> Reader:
    """Without a shape where the recipe names none."""
    named = source.format or data.format
    columns = {str(name): column for name, column in data.columns.items()}
    return Reader(None if named == "auto" else named, data.messages, data.tools, columns)


def open_training_data(data: DataSection, seed: int) -> tuple[Mixture | Stream, Mixture | None]:
    """The data to train on, and the share of it that is held back for evaluation.

    Raises:
        UserError: as `open_data`; or a stream is to be grouped or divided.
    """
    opened = open_data(data, data.train)
    for key in ("group_by", "eval_fraction"):
        if getattr(data, key) is not None and isinstance(opened, Stream):
            raise UserError(f"data.{key}: a Hub stream is read in its own order; set data.streaming to false")
    if isinstance(opened, Stream):
        return opened, None
    if data.group_by is not None:
        opened = replace(opened, groups=group_rows(opened, data.group_by))
    return (opened, None) if data.eval_fraction is None else split_data(opened, data.eval_fraction, seed)


def group_rows(mixture: Mixture, column: str) -> Ints:
    """Of each row the number of its group: rows with the same value in `column`. A row without it stands alone.

    Raises:
        UserError: no row has the column.
    """
    numbers: dict[str, int] = {}
    groups: list[int] = []
    found: Counter[str] = Counter()
    for source in mixture.sources:
        for i in range(len(source.rows)):
            row = read_row(source.rows, i)
            value = row.get(column) if isinstance(row, dict) else None
            if value is None:
                found.update(row if isinstance(row, dict) and len(groups) < FIRST_ROWS else ())
                key = f"row {len(groups)}"
            else:
                key = json.dumps(value, sort_keys=True, default=str)
            groups.append(numbers.setdefault(key, len(numbers)))
    if all(key.startswith("row ") for key in numbers):
        columns = ", ".join(map(str, found)) or "nothing"
        raise UserError(f"data.group_by: no row has a column {column!r} (found: {columns})")
    return np.array(groups, np.int64)


def split_data(mixture: Mixture, fraction: float, seed: int) -> tuple[Mixture, Mixture]:
    """Hold back a share of the rows, by lot; whole groups where there are groups.

    Raises:
        UserError: nothing would be left on one side.
    """
    total = len(mixture)
    groups = np.arange(total) if mixture.groups is None else mixture.groups
    lots = np.random.default_rng((seed, 0x5EED)).permutation(int(groups.max()) + 1)
    by_lot = np.argsort(lots[groups], kind="stable")
    size = max(1, round(fraction * total))
    while size < total and groups[by_lot[size]] == groups[by_lot[size - 1]]:
        size += 1
    if size >= total:
        raise UserError(
            f"data.eval_fraction: {fraction} of {total} rows{'' if mixture.groups is None else ' in whole groups'} "
            "leaves nothing to train on; lower it, or name other data in data.eval"
        )
    held_back, own = np.sort(by_lot[:size]), np.sort(by_lot[size:])
    return replace(mixture, own=own), replace(mixture, own=held_back, groups=None)

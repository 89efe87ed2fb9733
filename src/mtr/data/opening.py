"""Opens the data that a recipe names: `data.train`, its groups, the share held out for evaluation, and `data.eval`.

Which rows are held out is a function of the seed: they are never trained on, in any epoch, in any process.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mtr.data.lines import Ints
from mtr.data.mixture import FIRST_ROWS, Mixture, Opened, read_row
from mtr.data.parsing import names
from mtr.data.policy import Policy
from mtr.data.shapes import Reader
from mtr.data.sources import open_source
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
            reader = reader.with_shape_of(read_row(rows, i) for i in range(min(len(rows), FIRST_ROWS)))
        name = rows.where(0).rpartition(", ")[0] if len(rows) else source.path
        files.append(Opened(rows, name, source.weight, reader))
    mixture = Mixture(tuple(files), policy)
    if not len(mixture):
        raise UserError(f"data: no rows in {', '.join(source.path for source in sources)}")
    return mixture


def _reader(data: DataSection, source: Source) -> Reader:
    """The reader of a source; without a shape if the recipe names none."""
    named = source.format or data.format
    columns = {str(name): column for name, column in data.columns.items()}
    return Reader(None if named == "auto" else named, data.messages, data.tools, columns)


def open_training_data(data: DataSection, seed: int) -> tuple[Mixture | Stream, Mixture | None]:
    """The data to train on, and the share of it that is held out for evaluation; None if there is no such share.

    Raises:
        UserError: as `open_data`; or a stream is to be grouped or split.
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
    """Of each row the number of its group: rows with the same value in `column`. A row without it is its own group.

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
                found.update(list(row) if isinstance(row, dict) and len(groups) < FIRST_ROWS else ())
                key = f"row {len(groups)}"
            else:
                key = json.dumps(value, sort_keys=True, default=str)
            groups.append(numbers.setdefault(key, len(numbers)))
    if all(key.startswith("row ") for key in numbers):
        columns = names(found) or "nothing"
        raise UserError(f"data.group_by: no row has a column {column!r} (found: {columns})")
    return np.array(groups, np.int64)


def split_data(mixture: Mixture, fraction: float, seed: int) -> tuple[Mixture, Mixture]:
    """Split off a random share of the rows for evaluation; whole groups where there are groups.

    Raises:
        UserError: nothing would be left to train on.
    """
    total = len(mixture)
    groups = np.arange(total) if mixture.groups is None else mixture.groups
    ranks = np.random.default_rng((seed, 0x5EED)).permutation(int(groups.max()) + 1)
    shuffled = np.argsort(ranks[groups], kind="stable")
    size = max(1, round(fraction * total))
    while size < total and groups[shuffled[size]] == groups[shuffled[size - 1]]:
        size += 1
    if size >= total:
        raise UserError(
            f"data.eval_fraction: {fraction} of {total} rows{'' if mixture.groups is None else ' in whole groups'} "
            "leaves nothing to train on; lower it, or name other data in data.eval"
        )
    held_out, own = np.sort(shuffled[:size]), np.sort(shuffled[size:])
    return replace(mixture, own=own), replace(mixture, own=held_out, groups=None)


def open_eval_data(data: DataSection, held_out: Mixture | None = None) -> dict[str, Mixture]:
    """The data to evaluate on by name: the sources of `data.eval`, or the share held out of the training data.

    Raises:
        UserError: a source cannot be opened, or is a stream.
    """
    if held_out is not None:
        return {"held back": held_out}
    names = _short_names([source.path for source in data.eval])
    opened = {}
    for name, source in zip(names, data.eval, strict=True):
        rows = open_data(data, [source])
        if isinstance(rows, Stream):
            raise UserError("data.eval: a Hub stream cannot be evaluated on; set data.streaming to false")
        opened[name] = rows
    return opened


def _short_names(paths: list[str]) -> list[str]:
    """File names if these are unique, else paths, numbered if these repeat too."""
    short = [Path(path).name for path in paths]
    if len(set(short)) == len(short):
        return short
    return paths if len(set(paths)) == len(paths) else [f"{path} ({i})" for i, path in enumerate(paths, 1)]

"""A tree as a row of plain lists, which `datasets` can store, and back.

    input_ids, position_ids, parent, subtree_end    [T] each, T tokens
    predictor, target_id, weight                    [N] each, N targets
    counts                                          JSON: what the tree was made from, and what of it is not trained

A conversation of which no turn is trained is a row of 0 tokens: what was left out, and why, stays with the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mtr.errors import UserError
from mtr.prepare.counts import Counts
from mtr.tree.layout import Layout

TOKENS = ("input_ids", "position_ids", "parent", "subtree_end")
TARGETS = ("predictor", "target_id", "weight")
COUNTS = "counts"
COLUMNS = (*TOKENS, *TARGETS, COUNTS)


def as_row(layout: Layout | None, counts: Counts) -> dict[str, Any]:
    """One row; None is a conversation without a trained turn."""
    arrays = {}
    for name in (*TOKENS, *TARGETS):
        kind = np.float64 if name == "weight" else np.int64
        arrays[name] = np.zeros(0, kind) if layout is None else getattr(layout, name).astype(kind)
    told = {name: value for name, value in vars(counts).items() if value}
    return {**arrays, COUNTS: json.dumps(told, ensure_ascii=False, sort_keys=True)}


def as_layout(row: Mapping[str, Any]) -> Layout:
    """
    Raises:
        UserError: columns are missing, or were changed.
    """
    if missing := [name for name in (*TOKENS, *TARGETS) if name not in row]:
        raise UserError(
            f"a row of trees without {', '.join(missing)}: map the data with mtr.TreeBuilder, and keep its columns "
            "(remove_unused_columns=False, where the trainer does not know them)"
        )
    columns: dict[str, Any] = {
        name: np.asarray(row[name], np.float64 if name == "weight" else np.int64) for name in TOKENS + TARGETS
    }
    for names in (TOKENS, TARGETS):
        if len({len(columns[name]) for name in names}) > 1:
            sizes = ", ".join(f"{name} {len(columns[name]):,}" for name in names)
            raise UserError(
                f"a row of trees was cut after mtr.TreeBuilder ({sizes}): turn off truncation and packing of the "
                "trainer (TRL: dataset_kwargs={'skip_prepare_dataset': True}), and set max_length there"
            )
    _check(columns)
    return Layout(**columns, leaves=())


def _check(columns: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: the numbers are not those of a tree.
    """
    here = np.arange(len(columns["input_ids"]))
    parent, end, predictor = columns["parent"], columns["subtree_end"], columns["predictor"]
    right = (parent >= -1) & (parent < here) & (end > here) & (end <= len(here))
    if not right.all() or ((predictor < 0) | (predictor >= len(here))).any() or (columns["weight"] <= 0).any():
        raise UserError("a row of trees does not hold a tree; map the data with mtr.TreeBuilder again")


def count_turns(trees: Any) -> Counts:
    """What happened to the rows that trees were made from: what is trained, and what is not, by reason.

    Args:
        trees: a `datasets.Dataset` that was mapped with a `TreeBuilder`, what the builder returned, or single rows.

    Raises:
        UserError: there is no column `counts`.
    """
    total = Counts()
    try:
        texts: Iterable[Any] = trees[COUNTS] if hasattr(trees, "keys") or hasattr(trees, "column_names") else trees
        for text in texts:
            told = json.loads(text if isinstance(text, str) else text[COUNTS])
            total.add(Counts(**{k: Counter(v) if isinstance(v, dict) else v for k, v in told.items()}))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"no column {COUNTS!r}: count_turns reads what mtr.TreeBuilder wrote") from None
    return total

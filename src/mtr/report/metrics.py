"""metrics.jsonl, read as far as it goes: the columns of its training lines and of its evaluations.

A run may still be writing the file, may have been killed in the middle of a line, or have been resumed: what cannot be
read is counted, and of a step that is there twice the later line counts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtr.errors import UserError
from mtr.report.lines import lines_of

Column = NDArray[np.float64]
TRAIN = (
    "loss",
    "learning_rate",
    "grad_norm",
    "num_conversations",
    "num_turns",
    "num_tokens",
    "num_supervised_tokens",
    "num_per_turn_tokens",
    "seconds",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "per_turn_tokens_per_second",
    "data_wait_seconds",
    "mfu",
    "peak_memory_bytes",
    "epoch",
    "total_seconds",
    "total_data_wait_seconds",
)
"""Numbers of a training line that are kept."""
EVAL = ("eval_loss", "seconds")
_TOTAL = "totals.tokens"
NOT_FINITE = "not finite"
"""Why a step made no update, as training writes it."""
_MOST_SKIPPED = 50
"""Steps without an update that are kept one by one."""
_LARGEST_STEP = 2**53
_LARGEST = 1e40
"""No number of a run is as large, and sums and pictures of such numbers overflow."""


@dataclass(frozen=True)
class Lines:
    """Numbers by name, one for each line; NaN where a line has none."""

    step: Column
    columns: dict[str, Column]

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]


@dataclass
class Metrics:
    """What metrics.jsonl says."""

    train: Lines
    evals: Lines
    totals: dict[str, Any] = field(default_factory=dict)
    """Counts of the whole run, as its last training line has them; empty if it has none."""
    by_source: dict[str, float] = field(default_factory=dict)
    """The last evaluation, where it has several sources."""
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """The first steps without an update, and why."""
    num_skipped: int = 0
    nonfinite_last: int = 0
    """Steps in a row at the very end whose loss or gradient was not finite."""
    damaged: int = 0
    """Lines that cannot be read."""
    is_cut: bool = False
    """The last line is incomplete."""
    repeated: int = 0
    """Lines that a later one of the same step, or an earlier step, replaces."""


def read_metrics(path: Path) -> Metrics:
    """
    Raises:
        UserError: the file cannot be read, or nothing in it is a line of metrics.
    """
    reader = _Reader()
    for line in lines_of(path, "restore the metrics.jsonl of the run"):
        reader.take(line)
    found = reader.found()
    if found.damaged and not len(found.train) and not len(found.evals):
        raise UserError(
            f"{path}: none of its {found.damaged:,} lines is one of metrics, a JSON object with a step; restore the "
            "file from a copy, or remove it to see the rest of the run"
        )
    return found


def number(value: object) -> float:
    """A finite number of usual size; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        converted = float(value)
    except OverflowError:
        return math.nan
    return converted if abs(converted) <= _LARGEST else math.nan


class _Reader:
    def __init__(self) -> None:
        self._train: list[tuple[float, ...]] = []
        self._evals: list[tuple[float, ...]] = []
        self._skipped: list[tuple[int, str]] = []
        self._totals: dict[str, Any] = {}
        self._by_source: dict[str, float] = {}
        self._damaged = 0
        self._repeated = 0
        self._is_cut = False

    def take(self, raw: bytes) -> None:
        self._damaged += self._is_cut  # a line that does not end is no damage only at the end of the file
        self._is_cut = False
        line = _parse(raw)
        if line is None:
            self._is_cut = not raw.endswith(b"\n")
            self._damaged += not self._is_cut
        elif "eval_loss" in line:
            self._add(self._evals, line, EVAL)
            sources = line.get("eval_loss_by_source")
            self._by_source = {str(k): number(v) for k, v in sources.items()} if isinstance(sources, dict) else {}
        else:
            self._add(self._train, line, TRAIN)
            self._take_rest(line)

    def _add(self, lines: list[tuple[float, ...]], line: dict[str, Any], names: tuple[str, ...]) -> None:
        step = line["step"]
        while lines and lines[-1][0] >= step:
            lines.pop()
            self._repeated += 1
        totals = line.get("totals")
        total = number(totals.get("tokens")) if isinstance(totals, dict) else math.nan
        lines.append((step, *(number(line.get(name)) for name in names), total))

    def _take_rest(self, line: dict[str, Any]) -> None:
        self._totals = line["totals"] if isinstance(line.get("totals"), dict) else {}
        while self._skipped and self._skipped[-1][0] >= line["step"]:
            self._skipped.pop()
        if line.get("skipped"):
            self._skipped.append((line["step"], str(line["skipped"])))

    def found(self) -> Metrics:
        train, evals = _columns(self._train, TRAIN), _columns(self._evals, EVAL)
        return Metrics(
            train,
            evals,
            self._totals,
            self._by_source,
            self._skipped[:_MOST_SKIPPED],
            len(self._skipped),
            self._nonfinite_last(),
            self._damaged,
            self._is_cut,
            self._repeated,
        )

    def _nonfinite_last(self) -> int:
        number = 0
        for step, why in reversed(self._skipped):
            if step != self._train[-1][0] - number or why != NOT_FINITE:  # steps between two lines made an update
                break
            number += 1
        return number


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    step = line.get("step")
    return line if type(step) is int and 0 <= step < _LARGEST_STEP else None


def _columns(rows: list[tuple[float, ...]], names: tuple[str, ...]) -> Lines:
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 2 + len(names))
    return Lines(table[:, 0], {name: table[:, i + 1] for i, name in enumerate((*names, _TOTAL))})


def progress_of(lines: Lines) -> tuple[Column, Column, bool]:
    """Tokens that the device has processed and seconds spent in steps, up to each line.

    Returns:
        Both, and whether they are estimated: lines without totals count for the steps before them that have no line.
    """
    tokens, seconds = lines[_TOTAL], lines["total_seconds"]
    if not np.isnan(tokens).any() and not np.isnan(seconds).any():
        return tokens, seconds, False
    gaps = np.diff(lines.step, prepend=0.0)
    estimated = [np.cumsum(np.nan_to_num(lines[name]) * gaps) for name in ("num_tokens", "seconds")]
    return estimated[0], estimated[1], bool((gaps > 1).any())

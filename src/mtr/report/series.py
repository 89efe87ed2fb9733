"""A series of a chart, thinned so that a page stays small however long the run was.

points   p0 p1 p2 | p3 p4 p5 | p6 ...        buckets of equal numbers of points
kept     step of the last, mean, lowest and highest value of each bucket
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mtr.report.metrics import Column

MOST_POINTS = 400
"""Of a series."""


def thin(step: Column, value: Column, most: int = MOST_POINTS) -> dict[str, Any] | None:
    """The points that have a value: `step` and `value`; of a longer series also `low` and `high` of each bucket, and
    the points (step, value) that are `first`, `last`, `lowest` and `highest` of all, which buckets do not tell.

    Returns:
        None if no point has a value.
    """
    known = np.isfinite(value)
    step, value = step[known], value[known]
    if not len(step):
        return None
    if len(step) <= most:
        return {"step": step.astype(int).tolist(), "value": _short(value)}
    edges = np.linspace(0, len(step), most + 1).astype(int)
    starts, ends = edges[:-1], edges[1:]
    places = {"first": 0, "last": -1, "lowest": int(value.argmin()), "highest": int(value.argmax())}
    mean = np.add.reduceat(value, starts) / (ends - starts)
    return {
        "step": step[ends - 1].astype(int).tolist(),
        "value": _short(mean),
        "low": _short(np.minimum.reduceat(value, starts)),
        "high": _short(np.maximum.reduceat(value, starts)),
        **{name: [int(step[place]), *_short(value[[place]])] for name, place in places.items()},
    }


def thin_axis(step: Column, *others: Column, most: int = MOST_POINTS) -> list[list[float]]:
    """Values that only grow, at evenly spaced lines, the first and the last among them; the page interpolates."""
    places = np.unique(np.linspace(0, max(len(step) - 1, 0), min(len(step), most)).astype(int))
    return [_short(column[places]) for column in (step, *others)]


def _short(values: Column) -> list[float]:
    """Six digits are more than a chart shows."""
    return [float(f"{value:.6g}") for value in values.tolist()]

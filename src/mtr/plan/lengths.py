"""How a number is spread over turns or conversations: a few ranks, and a histogram of equal bins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 16


@dataclass(frozen=True)
class Spread:
    minimum: int
    median: int
    percentile_95: int
    maximum: int
    edges: tuple[float, ...]
    """Of the bins, one more than there are bins."""
    counts: tuple[int, ...]
    """Of each bin; the last one holds its upper edge."""


def spread(values: Sequence[int]) -> Spread | None:
    """None if there are no values. Whole numbers of a small range have a bin each."""
    if not values:
        return None
    ordered = np.sort(np.asarray(values))
    low, high = int(ordered[0]), int(ordered[-1])
    bins = min(BINS, high - low + 1)
    edges = np.arange(low, high + 2) if bins == high - low + 1 else np.linspace(low, high, bins + 1)
    counts, edges = np.histogram(ordered, bins=edges)
    median, most = (int(ordered[-(-len(ordered) * per_cent // 100) - 1]) for per_cent in (50, 95))
    return Spread(low, median, most, high, tuple(map(float, edges)), tuple(map(int, counts)))

"""How a run is going, for its line in the terminal: the loss so far in a few characters, and the time that is left."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from mtr.console import BLOCKS, block

_NOT_FINITE = "x"
_RECENT = 50
"""Reports over which the pace is taken: a run gets faster once its kernels are compiled, or slower with longer rows."""


class Pace:
    """Estimates the time left from how long the recent steps took, with all that happened between them."""

    def __init__(self, num_steps: int, start: int, now: float) -> None:
        """
        Args:
            start: steps done before, where a run is continued.
            now: seconds on a clock that never goes back.
        """
        self._num_steps = num_steps
        self._start = start, now
        self._reports: deque[tuple[int, float]] = deque(maxlen=_RECENT)

    def reached(self, step: int, now: float) -> None:
        """A step is done."""
        self._reports.append((step, now))

    def left(self, now: float) -> float | None:
        """Seconds until the last step is done; None before the first one is.

        The time up to the first report, which has loading and compiling in it, counts as long as there is no other.
        """
        if not self._reports:
            return None
        first, began = self._reports[0] if len(self._reports) > 1 else self._start
        last, at = self._reports[-1]
        if last <= first:
            return None
        return max((self._num_steps - last) * (at - began) / (last - first) - (now - at), 0.0)


def sparkline(values: Sequence[float | None], width: int, blocks: str = BLOCKS) -> str:
    """The values in at most `width` characters, from the lowest block for the least of them to the highest one.

    Values that share a character are drawn as their mean, as an x where that is not finite. None is no value: a space.
    """
    number = min(len(values), width)
    groups = [values[i * len(values) // number : (i + 1) * len(values) // number] for i in range(number)]
    means = [_mean([value for value in group if value is not None]) for group in groups]
    finite = [mean for mean in means if mean is not None and math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(_block(mean, low, high, blocks) for mean in means)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _block(value: float | None, low: float, high: float, blocks: str) -> str:
    if value is None:
        return " "
    if not math.isfinite(value):
        return _NOT_FINITE
    return block((value - low) / (high - low) if high > low else 0.0, blocks)


def time_left(seconds: float) -> str:
    """40 s, 3 min 20 s, 35 min, 2 h 05 min or 1 d 4 h: as much as an estimate can tell."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min" + (f" {rest:02} s" if minutes < 10 else "")
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"

"""The picture of `mtr report`: the curves of the page and its main results, drawn with matplotlib."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtr.files import written_whole
from mtr.pages.report import CHARTS
from mtr.report.results import best, rows_with_values, short, written

_COLOURS = ("#0a58a8", "#b3500b", "#0b6f5f", "#8b3a93", "#4d5563")
"""Of the series in shell.css, in light."""
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2.2)), (0, (1.2, 1.6)), (0, (5, 1.6, 1.2, 1.6)))
_STYLE: Any = {"font.family": "DejaVu Sans", "text.parse_math": False, "font.size": 9}
_INK, _MUTED, _LINE = "#181b20", "#535b69", "#d5dae2"
_RESULTS = (
    "loss_recent",
    "best_eval_loss",
    "right_before",
    "right_after",
    "turns",
    "supervised_tokens",
    "tokens",
    "per_turn_tokens",
    "seconds",
    "tokens_per_second",
    "per_turn_tokens_per_second",
    "mfu",
    "data_wait",
    "peak_memory_bytes",
)
_MOST_COLUMNS = 6
"""Runs that the table has room for; the curves show all."""
_MOST_BESIDE = 3
"""Runs whose recipe differences fit beside it."""


def write_report_picture(path: Path, report: dict[str, Any]) -> None:
    """
    Args:
        path: its suffix is the format: .png, .svg or .pdf.
        report: of `mtr.report.report.report`.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # drawn as a box
        figure = _draw(report)
        options = {"pil_kwargs": {"optimize": True}} if path.suffix == ".png" else {}
        with written_whole(path) as partial:
            figure.savefig(partial, dpi=96, **options)


def _draw(report: dict[str, Any]) -> Any:
    import matplotlib.figure as figure

    runs = report["runs"]
    charts = [chart for chart in CHARTS if any(chart["key"] in run["series"] for run in runs)]
    wide = [chart for chart in charts if chart.get("wide")]
    small = [chart for chart in charts if not chart.get("wide")]
    rows = math.ceil(len(small) / 4)
    shown = [row for row in rows_with_values([run["results"] for run in runs]) if row.key in _RESULTS]
    heights = [0.45 + 0.24 * len(runs), 2.7 if wide else 0.01, *[2.0] * rows, 0.5 + 0.225 * len(shown)]
    drawing = figure.Figure(figsize=(13, sum(heights)), facecolor="white")
    drawing.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06, hspace=0.03, wspace=0.02)
    grid = drawing.add_gridspec(len(heights), 4, height_ratios=heights)
    _head(drawing.add_subplot(grid[0, :]), runs)
    for place, chart in enumerate(wide):
        columns = slice(None) if len(wide) == 1 else slice(2 * place, 2 * place + 2)
        _curve(drawing.add_subplot(grid[1, columns]), chart, runs)
    for place, chart in enumerate(small):
        _curve(drawing.add_subplot(grid[2 + place // 4, place % 4]), chart, runs)
    foot = drawing.add_subplot(grid[-1, :])
    _table(foot, runs, shown)
    if len(runs) <= _MOST_BESIDE:
        _differences(foot, report["differences"], len(shown))
    return drawing


def _head(axes: Any, runs: Sequence[dict[str, Any]]) -> None:
    """Name and outcome of each run beside a piece of its line."""
    axes.axis("off")
    axes.set(xlim=(0, 100), ylim=(len(runs) + 1.2, 0))
    axes.text(0, 0.5, "mtr report", size=13, weight="bold", color=_INK, va="center")
    for index, run in enumerate(runs):
        at = index + 1.6
        axes.plot([0, 3.2], [at, at], color=_colour(index), linestyle=_dashes(index), linewidth=2)
        text = textwrap.shorten(f"{run['name']}: {run['outcome']['text']}", 150, placeholder=" …")
        axes.text(4, at, text, color=_INK, va="center", size=9.5)


def _curve(axes: Any, chart: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    import matplotlib.ticker as ticker

    for index, run in enumerate(runs):
        if series := run["series"].get(chart["key"]):
            _line(axes, chart, series, index)
    kind = chart.get("kind", "number")
    values = [value for run in runs for value in run["series"].get(chart["key"], {}).get("value", [])]
    if chart.get("log") and _has_spikes(runs, chart["key"]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _tick(value)))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    elif chart.get("zero") or min(values) >= 0:
        axes.set_ylim(bottom=0)
    if axes.get_yscale() == "linear":
        unit = 2**30 if kind == "bytes" else 1
        write = {
            "percent": lambda value, _: f"{100 * value:.3g}%",
            "bytes": lambda value, _: f"{value / 2**30:.3g} GiB",
        }
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(write.get(kind, lambda value, _: _tick(value))))
        axes.yaxis.set_major_locator(_locator(ticker, unit, 6 if chart.get("wide") else 4))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(7 if chart.get("wide") else 4, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(left=0)
    axes.set_title(chart["title"], loc="left", size=9.5, weight="bold", color=_INK)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=8, length=2.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    if chart.get("wide"):
        axes.set_xlabel("step", size=8, color=_MUTED)


def _line(axes: Any, chart: dict[str, Any], series: dict[str, Any], index: int) -> None:
    """The raw curve, or its range, behind a smoothed one."""
    steps, values, colour = series["step"], series["value"], _colour(index)
    marks: dict[str, Any] = {}
    if chart.get("smooth") and len(values) >= 40:
        if "low" not in series:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        values = smoothed(values, 0.75 if len(values) < 200 else 0.9)
    elif chart.get("points") and len(values) <= 60:
        marks = {"marker": "o", "markersize": 3}
    if "low" in series:
        axes.fill_between(steps, series["low"], series["high"], color=colour, alpha=0.18, linewidth=0)
    axes.plot(steps, values, color=colour, linestyle=_dashes(index), linewidth=1.7, **marks)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Mean with weights weight^distance, over as many points before as after; as in report_chart.js."""
    most = math.ceil(math.log(0.02) / math.log(weight))
    found = []
    for i, value in enumerate(values):
        total, weights = value, 1.0
        for distance in range(1, min(most, i, len(values) - 1 - i) + 1):
            factor = weight**distance
            total += factor * (values[i - distance] + values[i + distance])
            weights += 2 * factor
        found.append(total / weights)
    return found


def _has_spikes(runs: Sequence[dict[str, Any]], key: str) -> bool:
    """Whether rare high values would press all others to the foot of a linear scale; as in report_chart.js."""
    for run in runs:
        if series := run["series"].get(key):
            ordered = sorted(series["value"])
            if ordered[0] > 0 and max(series.get("high", ordered)) > 25 * ordered[len(ordered) // 2]:
                return True
    return False


def _locator(ticker: Any, unit: float, most: int) -> Any:
    """Ticks that are round in a unit."""

    class Locator(ticker.MaxNLocator):  # type: ignore[misc]
        def tick_values(self, low: float, high: float) -> Any:
            return super().tick_values(low / unit, high / unit) * unit

    return Locator(most, steps=[1, 2, 2.5, 5, 10])


def _tick(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-") if abs(value) < 1000 else short(value)


def _table(axes: Any, runs: Sequence[dict[str, Any]], shown: Sequence[Any]) -> None:
    """The main results side by side."""
    axes.axis("off")
    found = [run["results"] for run in runs]
    runs = runs[:_MOST_COLUMNS]
    axes.set(xlim=(0, 100), ylim=(len(shown) + 1.3, 0))
    places = [34 + 12 * column for column in range(len(runs))]
    for column, run in enumerate(runs):
        name = textwrap.shorten(run["name"], 22, placeholder="…") or run["name"][:20] + "…"
        axes.text(places[column], 0.5, name, ha="right", va="center", weight="bold", color=_colour(column))
    if len(found) > len(runs):
        axes.text(0, 0.5, f"the first {len(runs)} of {len(found)} runs", va="center", color=_MUTED)
    for number, row in enumerate(shown):
        at = number + 1.5
        first = best(row, found)
        axes.axhline(at - 0.5, color=_LINE, linewidth=0.6, xmax=(places[-1] + 2) / 100)
        axes.text(0, at, row.label, va="center", color=_MUTED)
        for column in range(len(runs)):
            weight = "bold" if column == first else "normal"
            axes.text(
                places[column], at, written(row, found[column]), ha="right", va="center", color=_INK, weight=weight
            )


def _differences(axes: Any, rows: Sequence[dict[str, Any]], most: int) -> None:
    """Recipe keys that differ, at the right of the table."""
    shown = rows if len(rows) <= most else rows[: most - 1]
    if shown:
        axes.text(72, 0.5, "recipe differences", va="center", weight="bold", color=_INK)
    for number, row in enumerate(shown):
        values = " · ".join(value if len(value) <= 16 else f"{value[:15]}…" for value in row["values"])
        axes.text(72, number + 1.5, row["key"], va="center", color=_MUTED)
        axes.text(100, number + 1.5, values, ha="right", va="center", color=_INK)
    if len(shown) < len(rows):
        axes.text(72, len(shown) + 1.5, f"and {len(rows) - len(shown)} more", va="center", color=_MUTED)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _dashes(index: int) -> Any:
    return _DASHES[index % len(_DASHES)]

"""What `mtr report` shows in a terminal: outcomes, curves in a line each, results, what was not trained."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mtr.cli.views.tables import count, plain_table
from mtr.console import block, printable, shorten
from mtr.report.played import first_change
from mtr.report.results import best, duration, four, rows_with_values, short, written

_STATES = {
    "finished": ("green", "✓"),
    "running": ("cyan", "●"),
    "stopped": ("yellow", "■"),
    "failed": ("red", "✗"),
    "empty": ("dim", "○"),
}
_STYLES = ("blue", "yellow", "green", "magenta", "cyan")
_CURVES = (
    ("loss", "training loss", four),
    ("eval_loss", "eval loss", four),
    ("grad_norm", "gradient norm", four),
    ("learning_rate", "learning rate", four),
    ("tokens_per_second", "tokens/s", short),
)
_MAIN = {
    "loss_recent": "training  \nloss  ",
    "best_eval_loss": "lowest  \neval loss  ",
    "right_after": "turns  \nright  ",
    "tokens_per_second": "tokens/s  ",
    "seconds": "time  ",
}
"""Headings of the results of many runs; the last two places are for a mark."""
_ENDS = (("first", 0), ("last", -1))
"""Of a series: a long one is thinned, and has its ends beside it."""
_FEW = 3
"""Runs for which all curves are shown; for more of them, only the losses."""
_NAME = 18
"""Most characters of a run's name."""


def show_report(report: dict[str, Any], out: Console) -> None:
    """Print what `mtr.report.report.report` returned, within the width of the console."""
    runs = report["runs"]
    _show_outcomes(runs, out)
    _show_curves(runs, out)
    _show_results(runs, out)
    _show_not_trained(runs, out)
    _show_recipes(report, out)
    _show_played(runs, out)


def _show_outcomes(runs: Sequence[dict[str, Any]], out: Console) -> None:
    width = max(len(_name(run)) for run in runs)
    for index, run in enumerate(runs):
        outcome = run["outcome"]
        style, mark = _STATES[outcome["state"]]
        left = "" if outcome["seconds_left"] is None else f", about {duration(outcome['seconds_left'])} left"
        name = f"[{_style(index, runs)}]{_safe(_name(run).ljust(width))}[/]"
        _wrap(f"{name}  [{style}]{mark} ", f"{outcome['text']}{left}", width + 4, out)
        for missing in run["missing"]:
            _wrap(f"{' ' * (width + 4)}[dim]", missing, width + 4, out)


def _wrap(before: str, text: str, indent: int, out: Console) -> None:
    """Text after something of the width of its indentation, which is markup and leaves one style open."""
    first, *rest = textwrap.wrap(printable(text), max(20, out.width - indent)) or [""]
    out.print(f"{before}{escape(first)}[/]")
    style = before.rpartition("[")[2].partition("]")[0]
    for line in rest:
        out.print(f"{' ' * indent}[{style}]{escape(line)}[/]")


# --- curves -----------------------------------------------------------------------------------------------------------


def _show_curves(runs: Sequence[dict[str, Any]], out: Console) -> None:
    curves = _CURVES if len(runs) <= _FEW else _CURVES[:2]
    labels = [_name(run) for run in runs] if len(runs) > 1 else [label for _, label, _ in curves]
    width = max(map(len, labels))
    room = max(10, min(out.width, 120) - width - 28)
    for key, label, write in curves:
        shown = [(index, run["series"][key]) for index, run in enumerate(runs) if key in run["series"]]
        if not shown:
            continue
        if len(runs) > 1 or key == curves[0][0]:
            out.print()
        if len(runs) > 1:
            out.print(f"[bold]{label}[/]")
        values = [value for _, series in shown for value in series["value"]]
        last = max(series["step"][-1] for _, series in shown)
        for index, series in shown:
            cells = max(1, round(room * series["step"][-1] / max(last, 1)))
            line = sparkline(series["step"], series["value"], cells, (min(values), max(values)))
            name = (_name(runs[index]) if len(runs) > 1 else label).ljust(width)
            first, end = (series[name][1] if name in series else series["value"][i] for name, i in _ENDS)
            ends = f"{write(first)} to {write(end)}"
            out.print(f"{_safe(name)}  [{_style(index, runs)}]{line.ljust(room)}[/]  {ends}")


def sparkline(steps: Sequence[float], values: Sequence[float], cells: int, bounds: tuple[float, float]) -> str:
    """A curve in one line: the mean of the values in each part of the steps, or what it was before.

    Args:
        bounds: values of the lowest and the highest block.
    """
    sums, numbers = [0.0] * cells, [0] * cells
    for step, value in zip(steps, values, strict=True):
        cell = min(cells - 1, max(0, math.ceil(cells * step / max(steps[-1], 1)) - 1))
        sums[cell] += value
        numbers[cell] += 1
    (low, high), line, latest = bounds, "", ""
    for total, number in zip(sums, numbers, strict=True):
        if number:
            latest = block((total / number - low) / (high - low) if high > low else 0.5)
        line += latest or " "
    return line


# --- tables -----------------------------------------------------------------------------------------------------------


def _show_results(runs: Sequence[dict[str, Any]], out: Console) -> None:
    found = [run["results"] for run in runs]
    rows = rows_with_values(found)
    if not rows:
        return
    firsts = [best(row, found) for row in rows]
    if len(runs) > _FEW:
        _show_ranking(runs, out)
        return
    for columns in _groups(runs, 34, out.width):
        table = plain_table("", ["", *(_safe(_name(runs[i])) for i in columns)], left=[""])
        table.show_header = len(runs) > 1
        for row, first in zip(rows, firsts, strict=True):
            cells = [
                f"[bold]{written(row, found[i])} *[/]" if i == first else f"{written(row, found[i])}  " for i in columns
            ]
            table.add_row(row.label, *(cells if len(runs) > 1 else [cell.strip() for cell in cells]))
        _print(table, out)
    if any(first is not None for first in firsts):
        out.print("[dim]* best of the runs[/]")
    if any(one["estimated"] for one in found):
        out.print("[dim]~ estimated from the steps that were logged[/]")


def _show_ranking(runs: Sequence[dict[str, Any]], out: Console) -> None:
    """The main results of many runs, a line for each."""
    found = [run["results"] for run in runs]
    rows = [row for row in rows_with_values(found) if row.key in _MAIN]
    table = plain_table("", ["", *(_MAIN[row.key] for row in rows)], left=[""])
    firsts = [best(row, found) for row in rows]
    for place, (run, one) in enumerate(zip(runs, found, strict=True)):
        cells = [
            f"{written(row, one)}{' *' if first == place else '  '}" for row, first in zip(rows, firsts, strict=True)
        ]
        table.add_row(f"[{_style(place, runs)}]{_safe(_name(run))}[/]", *cells)
    _print(table, out)
    marks = ["* best of the runs"] if any(first is not None for first in firsts) else []
    marks += ["~ estimated from the steps that were logged"] if any(one["estimated"] for one in found) else []
    _wrap("[dim]", "; ".join([*marks, "--html and --json have all numbers"]), 0, out)


def _show_not_trained(runs: Sequence[dict[str, Any]], out: Console) -> None:
    lines: list[tuple[str, str]] = []
    for index, run in enumerate(runs):
        name = f"[{_style(index, runs)}]{_safe(_name(run))}[/]: " if len(runs) > 1 else ""
        counts = run["counts"] or {}
        for key, words in (("untrained_turns", "turn"), ("untrained_rows", "row"), ("skipped_rows", "row")):
            how = "skipped" if key == "skipped_rows" else "not trained"
            for reason, number in counts.get(key, {}).items():
                lines.append((name, f"{count(number, words)} {how}: {reason}"))
        if not any(counts.get(key) for key in ("untrained_turns", "untrained_rows", "skipped_rows")) and counts:
            lines.append((name, "every turn that was seen was trained"))
    if lines:
        out.print()
        for name, text in lines:
            _wrap(f"{name}[default]", text, len(_plain(name)), out)


def _show_recipes(report: dict[str, Any], out: Console) -> None:
    runs = report["runs"]
    if len(runs) < 2:
        return
    if not report["differences"]:
        out.print("\nthe recipes are equal")
        return
    longest = max(len(row["key"]) for row in report["differences"])
    for columns in _groups(runs, longest + 11, out.width):
        names = [_safe(_name(runs[i])) for i in columns]
        table = plain_table("", ["recipe", *names, "default"], left=["recipe", *names, "default"])
        for row in report["differences"]:
            values = [_safe(shorten(row["values"][i], _NAME)) for i in columns]
            table.add_row(_safe(row["key"]), *values, f"[dim]{_safe(shorten(row['default'] or '-', 16))}[/]")
        _print(table, out)
    if different := [row["what"] for row in report["sources"] if row["same"] is False]:
        out.print(f"[yellow]not the same by content: {', '.join(different)}[/]")


def _show_played(runs: Sequence[dict[str, Any]], out: Console) -> None:
    """One turn as an example."""
    for index, run in enumerate(runs):
        example = first_change(run["played"]["conversations"])
        if example is None:
            continue
        where, turn = example
        name = f"[{_style(index, runs)}]{_safe(_name(run))}[/], " if len(runs) > 1 else ""
        room = max(20, out.width - 16)
        out.print(f"\n{name}{_safe(shorten(where, 50))}, turn {turn['turn']}")
        wanted = turn.get("answer") or turn["reference"]
        lines = [("asked", turn["asked"]), ("expected", wanted)]
        lines += [(when, turn[when]["response"]) for when in ("before", "after") if turn[when]]
        for label, text in lines:
            if text is None:
                continue
            said = turn[label] if label in ("before", "after") else None
            verdict = "" if said is None else "[green]right[/] " if said["right"] else "[red]wrong[/] "
            out.print(f"  [dim]{label:<9}[/]{verdict}{_safe(shorten(text.strip(), room))}")
        return


def _groups(runs: Sequence[dict[str, Any]], used: int, width: int) -> Iterator[range]:
    """As many runs beside one another as fit into the width."""
    widest = max([len(_name(run)) for run in runs] + [12]) + 2
    fit = max(1, (width - used) // widest)
    for start in range(0, len(runs), fit):
        yield range(start, min(start + fit, len(runs)))


def _print(table: Table, out: Console) -> None:
    table.title = None
    out.print()
    out.print(table)


def _plain(markup: str) -> str:
    return Text.from_markup(markup).plain


def _name(run: dict[str, Any]) -> str:
    return shorten(printable(str(run["name"])), _NAME)


def _style(index: int, runs: Sequence[dict[str, Any]]) -> str:
    return _STYLES[index % len(_STYLES)] if len(runs) > 1 else "bold"


def _safe(text: str) -> str:
    return escape(printable(text))

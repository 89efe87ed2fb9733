"""A plan as a picture: what a pass computes, token by token and by role, and how long conversations and turns are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtr.checks.role_colours import ON_WHITE
from mtr.checks.roles import ROLES
from mtr.files import written_whole
from mtr.plan.lengths import Spread
from mtr.plan.result import LITTLE, Plan

_ONE, _APART = ON_WHITE["response"], "#b7c0cc"
_LENGTHS = {
    "turns": "turns of a conversation",
    "conversation": "tokens of a conversation",
    "prompt": "tokens of a prompt",
    "completion": "tokens of a completion",
}


def draw(plan: Plan, path: Path) -> None:
    """
    Args:
        path: its suffix is the format; replaced when the picture is whole.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib.figure as figure

    drawing = figure.Figure(figsize=(9, 6), layout="constrained")
    grid = drawing.add_gridspec(3, 4, height_ratios=[1.5, 0.75, 1.5], hspace=0.08)
    _work(plan, drawing.add_subplot(grid[0, :]))
    _roles(plan, drawing.add_subplot(grid[1, :]))
    for column, (name, title) in enumerate(_LENGTHS.items()):
        axes = drawing.add_subplot(grid[2, column])
        if name in plan.lengths:
            _histogram(plan.lengths[name], title, axes)
        else:
            axes.set_axis_off()
    drawing.suptitle(_title(plan), fontsize=12, x=0.01, ha="left")
    with written_whole(path) as partial:
        drawing.savefig(partial, dpi=150)


def _title(plan: Plan) -> str:
    """What it comes to, and by how many rows."""
    what, rows = "FLOPs" if plan.by_flops else "tokens", plan.rows
    said = f"one pass needs {plan.limit or 0:.2f} times fewer {what} than one pass per turn"
    if plan.limit is None:
        said = "no turn would be trained"
    elif plan.history == "kept" and plan.is_single_pass and plan.merged < LITTLE:
        said = "turns are one path: one pass saves nothing over ordinary training"
    of = "a stream" if rows.of_epoch is None else f"{rows.of_epoch:,}"
    return f"{said}, {rows.counted:,} rows of {of}" if rows.is_sample else said


def _work(plan: Plan, axes: Any) -> None:
    """Both ways as shares of one pass per turn."""
    one, apart = plan.single_pass, plan.per_turn
    rows: list[tuple[str, float, float]] = [
        ("tokens", one.way.tokens, apart.way.tokens),
        ("query-key pairs", one.way.pairs, apart.way.pairs),
    ]
    if plan.by_flops:
        rows.append(("FLOPs", one.total or 0, apart.total or 0))
    for number, (_, few, many) in enumerate(rows):
        share, whole = (few / many, 1.0) if many else (0.0, 0.0)
        axes.barh(number - 0.2, whole, 0.36, color=_APART, label="one pass per turn" if not number else None)
        axes.barh(number + 0.2, share, 0.36, color=_ONE, label="one pass" if not number else None)
        axes.annotate(f" {_amount(many)}", (whole, number - 0.2), va="center", fontsize=8)
        axes.annotate(f" {_amount(few)}", (share, number + 0.2), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.98), borderaxespad=0)


def _roles(plan: Plan, axes: Any) -> None:
    """One bar, trained roles hatched, so that they are told apart without colours."""
    total = sum(plan.roles.values())
    axes.set_axis_off()
    if not total:
        return
    start = 0.0
    for name in ROLES:
        share = plan.roles[name] / total
        if not share:
            continue
        trained = name in ("thinking", "response")
        label = f"{name}{' (trained)' if trained else ''} {share:.0%}"
        hatch = "///" if trained else None
        axes.barh(0, share, 0.5, left=start, color=ON_WHITE[name], hatch=hatch, edgecolor="white", label=label)
        start += share
    axes.set_xlim(0, 1.0)
    axes.set_ylim(-0.5, 0.25)
    of = "" if plan.role_rows == plan.conversations else f" (by {plan.role_rows:,} conversations)"
    axes.set_title(f"tokens of one pass by role{of}", fontsize=9, loc="left")
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=6,
        loc="upper left",
        bbox_to_anchor=(0.0, 0.3),
        borderaxespad=0,
        columnspacing=1.2,
        handlelength=1.4,
    )


def _histogram(spread: Spread, title: str, axes: Any) -> None:
    widths = [right - left for left, right in zip(spread.edges, spread.edges[1:], strict=False)]
    middle = 0.5 if spread.edges[-1] > spread.maximum else 0.0  # a number of its own has its bar over it
    axes.bar(
        [left - middle for left in spread.edges[:-1]],
        spread.counts,
        widths,
        align="edge",
        color="#7a8797",
        edgecolor="white",
        linewidth=0.5,
    )
    axes.axvline(spread.median, color="#c1121f", linewidth=1.2, linestyle="--")
    axes.set_title(f"{title}\nmedian {spread.median:,}, most {spread.maximum:,}", fontsize=8.5)
    axes.tick_params(labelsize=7)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _amount(number: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"

"""Plots of bench results, with the limit drawn in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtr.files import written_whole

_COLOURS = ("#2a6f97", "#e07a1f", "#3a7d44", "#7b2d8b", "#8c564b")
_LIMIT = "#c1121f"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the times of one bench as bars, or the speed-ups of a sweep against turns.

    Args:
        result: of `bench` or `sweep`.
        path: its suffix is the format.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib.figure as figure

    drawing = figure.Figure(figsize=(7, 4.6 if "points" in result else 3.4), layout="constrained")
    (_plot_sweep if "points" in result else _plot_cases)(result, drawing)
    with written_whole(path) as partial:
        drawing.savefig(partial, dpi=150)


def _plot_cases(result: dict[str, Any], drawing: Any) -> None:
    cases = [case for case in result["cases"] if "seconds" in case]
    bars = [(f"{case['strategy']}\n({case['attention']})", case["seconds"]) for case in cases]
    if "trl" in result:
        bars.append(
            (
                f"TRL {result['trl']['version']}\n({result['trl']['attention']})",
                result["trl"]["seconds"]["forward_backward"],
            )
        )
    packed = result["cases"][1]["seconds"]["median"]
    axes = drawing.add_subplot()
    medians = [seconds["median"] for _, seconds in bars]
    spread = [
        [seconds["median"] - seconds["min"] for _, seconds in bars],
        [seconds["max"] - seconds["median"] for _, seconds in bars],
    ]
    colours = [_COLOURS[0] if case["strategy"] == "single_pass" else "#a9b4c2" for case in cases]
    colours += ["#d3d8e0"] * (len(bars) - len(cases))
    axes.barh([name for name, _ in bars], medians, xerr=spread, color=colours, capsize=3)
    for i, seconds in enumerate(medians):
        axes.annotate(f" {packed / seconds:.2f}x", (0, i), va="center", color="white" if i == 0 else "black")
    label = f"limit: packed / {result['limit']['flops']:.2f}"
    axes.axvline(packed / result["limit"]["flops"], color=_LIMIT, linestyle="--", linewidth=1.2, label=label)
    axes.invert_yaxis()
    shape = result["shape"]
    axes.set_xlabel("seconds for forward and backward (median, min to max)")
    axes.set_title(
        f"{shape['conversations']} conversations, {shape['turns']} turns, on {result['device']}", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_sweep(result: dict[str, Any], drawing: Any) -> None:
    upper, lower = drawing.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    lengths = list(dict.fromkeys(point["thinking"] for point in result["points"]))
    ticks = sorted({point["turns"] for point in result["points"]})
    for number, length in enumerate(lengths):
        points = sorted((p for p in result["points"] if p["thinking"] == length), key=lambda point: point["turns"])
        turns = [point["turns"] for point in points]
        colour = _COLOURS[number % len(_COLOURS)]
        faster = [min(point["speedup"].values()) for point in points]
        upper.plot(turns, faster, "o-", color=colour, label=f"measured, thinking {length}")
        limits = [point["limit"]["flops"] for point in points]
        upper.plot(turns, limits, "--", color=colour, linewidth=1.2, label=f"limit, thinking {length}")
        lower.plot(turns, [point["figure_of_merit"] for point in points], "o-", color=colour)
    lower.axhline(1.0, color=_LIMIT, linestyle="--", linewidth=1)
    lower.set_ylim(0, max(1.2, *(point["figure_of_merit"] * 1.1 for point in result["points"])))
    upper.set_xscale("log", base=2)
    lower.set_xticks(ticks, [str(tick) for tick in ticks])
    lower.minorticks_off()
    lower.set_xlabel("turns")
    lower.set_ylabel("share of limit")
    upper.set_ylabel("speed-up over the faster\nper-turn baseline")
    first = result["points"][0]
    upper.set_title(
        f"per turn: user {first['user']}, response {first['response']} words, on {result['device']}", fontsize=10
    )
    upper.legend(frameon=False, fontsize=8)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

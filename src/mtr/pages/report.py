"""The page of `mtr report`: one run, or several side by side, in one file without network.

`report.html` holds its text and tables, `report_chart.js` draws the charts, `report.js` connects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from mtr.console import printable
from mtr.files import written_whole
from mtr.pages.report_played import played_side_by_side
from mtr.pages.shell import asset, page
from mtr.report.results import best, duration, four, one_decimal, rows_with_values, short, written

DASHES = ("none", "7 4", "2 3", "9 3 2 3")
"""Of the lines of runs, in turn, as in report_chart.js."""
CHARTS: tuple[dict[str, Any], ...] = (
    {"key": "loss", "title": "Training loss", "log": True, "smooth": True, "wide": True},
    {"key": "eval_loss", "title": "Eval loss", "log": True, "points": True, "wide": True},
    {"key": "grad_norm", "title": "Gradient norm", "log": True, "smooth": True},
    {"key": "learning_rate", "title": "Learning rate", "log": True},
    {"key": "tokens_per_second", "title": "Tokens/s", "zero": True, "smooth": True},
    {"key": "per_turn_tokens_per_second", "title": "Per-turn equivalent tokens/s", "zero": True, "smooth": True},
    {"key": "supervised_tokens_per_second", "title": "Supervised tokens/s", "zero": True, "smooth": True},
    {"key": "mfu", "title": "MFU", "kind": "percent", "zero": True, "smooth": True},
    {"key": "data_wait", "title": "Waiting for data", "kind": "percent", "zero": True, "smooth": True},
    {"key": "peak_memory_bytes", "title": "Peak memory", "kind": "bytes", "zero": True},
)
"""In their order. key: of a run's series; kind: how values are written, by default as numbers; log: offered; zero: the
axis begins there; smooth: the slider counts; points: each value is marked; wide: twice as wide."""
_COUNTERS = {
    "untrained_turns": "turns not trained",
    "untrained_rows": "rows not trained",
    "skipped_rows": "rows skipped",
    "notes": "trained turns with a note",
    "remarks": "rows with a remark",
}


def _without_steering(value: object) -> object:
    """Text of runs, with marks that reorder what is read written out."""
    return printable(value) if type(value) is str else value


def write_report_page(path: Path, report: dict[str, Any]) -> None:
    """
    Args:
        report: of `mtr.report.report.report`.

    Raises:
        OSError: the file cannot be written.
    """
    text = report_page(report)
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def report_page(report: dict[str, Any]) -> str:
    """The HTML document."""
    runs = report["runs"]
    charts = [dict(chart) for chart in CHARTS if any(chart["key"] in run["series"] for run in runs)]
    wide = [chart for chart in charts if chart.get("wide")]
    for chart in wide:
        chart["alone"] = len(wide) == 1
    kept = ("name", "series", "axis", "skipped")
    data = {"runs": [{key: run[key] for key in kept} for run in runs], "charts": charts}
    rows = _environment(runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_without_steering)
    environment.filters |= {"duration": duration, "four": four}
    body = environment.from_string(asset("report.html")).render(
        runs=runs,
        charts=charts,
        dashes=DASHES,
        stats=_stats(runs[0]["results"]) if len(runs) == 1 else [],
        estimated=any(run["axis"]["estimated"] for run in runs),
        skipped=_skipped(runs),
        results=_results(runs),
        trained=_trained(runs),
        recipe=report["differences"] if len(runs) > 1 else report["settings"],
        played=played_side_by_side(runs),
        environment=rows,
        differing=", ".join(row["key"] for row in rows if row["differs"]),
        date=report["date"][:16].replace("T", " "),
        version=report["mtr"],
        sampled=any(run["results"]["estimated"] for run in runs),
        made_from=_made_from(report["sources"]),
        not_comparable="best_eval_loss" in runs[0]["results"]["not_comparable"],
    )
    script = f"{asset('report_chart.js')}\n{asset('report.js')}"
    return page(title(runs), body, style=asset("report.css"), script=script, data=data)


def title(runs: Sequence[dict[str, Any]]) -> str:
    return f"mtr report: {runs[0]['name'] if len(runs) == 1 else f'{len(runs)} runs'}"


def _stats(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The main numbers of a single run."""
    wanted = [
        ("training loss, last 10 logged", results["loss_recent"], four),
        ("lowest eval loss", results["best_eval_loss"], four),
        ("turns right before", results["right_before"], one_decimal),
        ("turns right after", results["right_after"], one_decimal),
        ("tokens/s", results["tokens_per_second"], short),
        ("per-turn equivalent tokens/s", results["per_turn_tokens_per_second"], short),
        ("time in steps", results["seconds"], duration),
    ]
    return [(name, write(value)) for name, value, write in wanted if value is not None]


def _skipped(runs: Sequence[dict[str, Any]]) -> str:
    """Why steps made no update, in words; empty if all did."""
    found = {why: None for run in runs for _, why in run["skipped"]}
    return f" ({', '.join(found)})" if found else ""


def _results(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [run["results"] for run in runs]
    return [
        {"label": row.label, "texts": [written(row, one) for one in found], "best": best(row, found)}
        for row in rows_with_values(found)
    ]


def _trained(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The share of turns that were trained, and why others were not; None if no run says."""
    counts = [run["counts"] for run in runs]
    if not any(counts):
        return None
    shares = []
    for index, (run, known) in enumerate(zip(runs, counts, strict=True)):
        trained, left = (known["turns"] or 0, sum(known["untrained_turns"].values())) if known else (0, 0)
        if trained + left:
            share = 100 * trained / (trained + left)
            words = f"{trained:,} of {trained + left:,} turns trained ({share:.{1 if 99 < share < 100 else 0}f}%)"
            shares.append({"index": index, "name": run["name"], "words": words, "percent": f"{share:.2f}"})
    rows = [
        {"what": what, "reason": reason, "numbers": [known[key].get(reason, 0) if known else None for known in counts]}
        for key, what in _COUNTERS.items()
        for reason in dict.fromkeys(reason for known in counts if known for reason in known[key])
    ]
    return {"shares": shares, "rows": rows}


def _made_from(sources: Sequence[dict[str, Any]]) -> str:
    """What was the same, in words."""
    words = {True: "the same", False: "another", None: "not known"}
    groups = {same: [row["what"] for row in sources if row["same"] is same] for same in words}
    return "; ".join(f"{', '.join(names)}: {words[same]}" for same, names in groups.items() if names)


def _environment(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run["environment"]):
        values = [run["environment"].get(key, "-") for run in runs]
        rows.append({"key": key, "values": values, "differs": len(set(values)) > 1})
    return rows

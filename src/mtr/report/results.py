"""The results of a run as numbers, and how they are named, written and compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtr.report.metrics import Column, progress_of
from mtr.report.run import Run

_RECENT = 10
"""Logged steps that `loss_recent` is the mean of."""
_COUNTS = ("conversations", "turns", "tokens", "supervised_tokens", "per_turn_tokens")


@dataclass(frozen=True)
class Row:
    """One line of the table of results."""

    key: str
    label: str
    write: Callable[[float], str]
    better: int = 0
    """-1: the lowest of several runs is the best; 1: the highest; 0: neither."""


def results(run: Run) -> dict[str, Any]:
    """Numbers by the keys of `ROWS`; None where a run does not say. `estimated` names those that are an estimate."""
    train, evals = run.metrics.train, run.metrics.evals
    tokens, seconds, is_estimate = progress_of(train)
    loss = train["loss"][~np.isnan(train["loss"])]
    found: dict[str, Any] = dict.fromkeys([*(row.key for row in ROWS), "best_eval_step"])
    found |= {"steps": run.outcome.steps, "planned_steps": run.plan.steps}
    found |= {"loss": _last(loss), "loss_recent": _mean(loss[-_RECENT:])}
    found["eval_loss"] = _last(evals["eval_loss"])
    if len(evals) and not np.isnan(evals["eval_loss"]).all():
        best = int(np.nanargmin(evals["eval_loss"]))
        found |= {"best_eval_loss": float(evals["eval_loss"][best]), "best_eval_step": int(evals.step[best])}
    for when, said in (("before", run.played.before), ("after", run.played.after)):
        if said:
            found[f"right_{when}"] = said["right"] / said["turns"]
    found |= _counts(run, tokens, is_estimate) | {"seconds": _last(seconds) or None}
    spent = float(np.nansum(train["seconds"]))
    rates, are_sampled = _rates(run, spent)
    found |= rates
    found["peak_memory_bytes"] = float(np.nanmax(peak)) if len(peak := _known(train["peak_memory_bytes"])) else None
    has_mfu = ~np.isnan(train["mfu"] * train["seconds"])
    weights = train["seconds"][has_mfu]
    found["mfu"] = float(train["mfu"][has_mfu] @ weights / weights.sum()) if weights.sum() > 0 else None
    found["data_wait"] = _wait(run, spent)
    found["skipped_steps"] = run.metrics.num_skipped
    sampled = [*(rates if are_sampled else ()), "mfu"] if _has_gaps(run) else []
    found["estimated"] = [*(["seconds", "tokens"] if is_estimate else []), *sampled]
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in found.items()}


def _counts(run: Run, tokens: Column, is_estimate: bool) -> dict[str, Any]:
    """From the totals; without them, from the lines, where each step has one."""
    train = run.metrics.train
    if run.metrics.totals:
        return {name: _whole(run.metrics.totals.get(name)) for name in _COUNTS}
    if is_estimate:
        return {"tokens": _last(tokens) or None}
    return {name: _sum(train[f"num_{name}"]) for name in _COUNTS}


def _rates(run: Run, spent: float) -> tuple[dict[str, float | None], bool]:
    """Tokens a second, and whether they are those of the logged steps alone, where the totals do not say."""
    train, totals = run.metrics.train, run.metrics.totals
    seconds = _last(train["total_seconds"])
    names = ("tokens", "supervised_tokens", "per_turn_tokens")
    done: list[float] = [_whole(totals.get(name)) or 0 for name in names]
    are_sampled = not seconds or not any(done)
    if are_sampled:
        seconds, done = spent, [_sum(train[f"num_{name}"]) or 0 for name in names]
    return {
        f"{name}_per_second": number / seconds if seconds and number > 0 else None
        for name, number in zip(names, done, strict=True)
    }, are_sampled


def _has_gaps(run: Run) -> bool:
    """Whether steps were made that have no line."""
    return bool((np.diff(run.metrics.train.step, prepend=0.0) > 1).any())


def _wait(run: Run, spent: float) -> float | None:
    """Share of the time in steps."""
    train = run.metrics.train
    waited, total = _last(train["total_data_wait_seconds"]), _last(train["total_seconds"])
    if waited is not None and total:
        return waited / total
    waited = _sum(train["data_wait_seconds"])
    return waited / spent if waited is not None and spent > 0 else None


def _whole(value: object) -> int | None:
    return value if type(value) is int else None


def _sum(column: Column) -> float | None:
    """None if it is not known of every line: the sum of the others would be too small."""
    return float(column.sum()) if len(column) and not np.isnan(column).any() else None


def _known(column: Column) -> Column:
    return column[~np.isnan(column)]


def _last(column: Column) -> float | None:
    return float(column[-1]) if len(column) and not math.isnan(column[-1]) else None


def _mean(column: Column) -> float | None:
    return float(column.mean()) if len(column) else None


# --- in words ---------------------------------------------------------------------------------------------------------


def whole(value: float) -> str:
    return f"{value:,.0f}"


def short(value: float) -> str:
    """1,234; 56.7 k; 8.9 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):,.3g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def four(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def share(value: float) -> str:
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def one_decimal(value: float) -> str:
    return f"{value:.1%}"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """45 s; 3 min 20 s; 5 h 07 min; 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


ROWS = (
    Row("loss", "last training loss", four),
    Row("loss_recent", f"training loss, last {_RECENT} logged", four, -1),
    Row("best_eval_loss", "lowest eval loss", four, -1),
    Row("eval_loss", "last eval loss", four, -1),
    Row("right_before", "turns right before training", one_decimal),
    Row("right_after", "turns right after training", one_decimal, 1),
    Row("conversations", "conversations trained", whole),
    Row("turns", "turns trained", whole),
    Row("supervised_tokens", "supervised tokens", short),
    Row("tokens", "tokens processed", short),
    Row("per_turn_tokens", "tokens of one pass per turn", short),
    Row("seconds", "time in steps", duration),
    Row("tokens_per_second", "tokens/s", short, 1),
    Row("per_turn_tokens_per_second", "per-turn equivalent tokens/s", short, 1),
    Row("supervised_tokens_per_second", "supervised tokens/s", short, 1),
    Row("mfu", "MFU", share, 1),
    Row("data_wait", "waiting for data", share),
    Row("peak_memory_bytes", "peak memory", gibibytes),
    Row("skipped_steps", "steps without an update", whole),
)


def rows_with_values(found: list[dict[str, Any]]) -> list[Row]:
    """Those that some run has a value for; that of steps without an update only where there are some."""
    rows = [row for row in ROWS if any(one.get(row.key) is not None for one in found)]
    return [row for row in rows if row.key != "skipped_steps" or any(one["skipped_steps"] for one in found)]


def written(row: Row, one: dict[str, Any]) -> str:
    """The value of a run in a table; `~` before an estimate, `-` for none."""
    value = one.get(row.key)
    if value is None:
        return "-"
    at = f" at {one['best_eval_step']:,}" if row.key == "best_eval_loss" else ""
    return f"{'~' if row.key in one['estimated'] else ''}{row.write(value)}{at}"


def best(row: Row, found: list[dict[str, Any]]) -> int | None:
    """The place of the run with the best value, where one of several is better than all others.

    None, too, where a run names the value `not_comparable`.
    """
    if any(row.key in one.get("not_comparable", ()) for one in found):
        return None
    values = [(one[row.key], place) for place, one in enumerate(found) if one.get(row.key) is not None]
    if not row.better or len(values) < 2:
        return None
    ordered = sorted(values, reverse=row.better > 0)
    return ordered[0][1] if ordered[0][0] != ordered[1][0] else None

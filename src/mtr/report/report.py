"""`mtr report`: runs side by side, as plain data that the terminal, the page, the picture and JSON show.

    report([folder, ...]) -> {"mtr", "date", "runs": [...], "differences": [...], "sources": [...], "settings": [...]}

Each run: name, outcome {state, text, seconds_left}, missing, results (see `mtr.report.results`), series by name, axis
{step, tokens, seconds, estimated}, skipped [[step, why]], counts {turns; untrained_turns, ...: by reason}, rejects,
played (see `mtr.report.played`), environment.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtr import __version__
from mtr.console import printable
from mtr.errors import UserError
from mtr.report.metrics import Metrics, progress_of
from mtr.report.recipes import differences, not_comparable, own_settings, sources
from mtr.report.results import results
from mtr.report.run import Run, by_reason, read_run
from mtr.report.series import thin, thin_axis

MOST_RUNS = 20
REASONS = ("untrained_turns", "untrained_rows", "skipped_rows", "notes", "remarks")
"""Counters of `mtr.prepare.counts.Counts`."""
_SERIES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "per_turn_tokens_per_second",
    "mfu",
    "peak_memory_bytes",
)
_TOKENS = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "CLEARML_API_SECRET_KEY")


def report(folders: Sequence[Path]) -> dict[str, Any]:
    """
    Raises:
        UserError: a folder is not that of a run, a file in it is damaged, or there are too many runs.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    if len(unique) > MOST_RUNS:
        raise UserError(f"{len(unique)} runs: at most {MOST_RUNS} can be told apart on one page; name fewer")
    runs = [read_run(folder) for folder in unique]
    recipes, environments = [run.recipe for run in runs], [run.environment for run in runs]
    made: dict[str, Any] = {
        "mtr": __version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "runs": [_describe(run, name) for run, name in zip(runs, _names(unique), strict=True)],
        "differences": differences(recipes) if len(runs) > 1 else [],
        "settings": own_settings(recipes[0]) if len(runs) == 1 else [],
        "sources": sources(environments) if len(runs) > 1 else [],
    }
    for one in made["runs"]:
        one["results"]["not_comparable"] = not_comparable(made["sources"], made["differences"])
    cleaned: dict[str, Any] = without_secrets(made)
    return cleaned


def _describe(run: Run, name: str) -> dict[str, Any]:
    tokens, seconds, is_estimate = progress_of(run.metrics.train)
    step, at_tokens, at_seconds = thin_axis(run.metrics.train.step, tokens, seconds)
    return {
        "name": name,
        "outcome": vars(run.outcome),
        "missing": list(run.missing),
        "results": results(run),
        "series": _series(run.metrics),
        "eval_by_source": run.metrics.by_source,
        "axis": {"step": step, "tokens": at_tokens, "seconds": at_seconds, "estimated": is_estimate},
        "skipped": [list(one) for one in run.metrics.skipped],
        "counts": _counts(run.totals),
        "rejects": vars(run.rejects),
        "played": vars(run.played),
        "environment": _environment(run.environment),
    }


def _counts(totals: dict[str, Any]) -> dict[str, Any] | None:
    """Trained turns, and every counter of reasons."""
    turns = totals.get("turns")
    known = {"turns": turns if type(turns) is int else None}
    return {**known, **{key: by_reason(totals, key) for key in REASONS}} if totals else None


def _series(metrics: Metrics) -> dict[str, Any]:
    train, evals = metrics.train, metrics.evals
    found = {name: thin(train.step, train[name]) for name in _SERIES}
    found["eval_loss"] = thin(evals.step, evals["eval_loss"])
    found["data_wait"] = thin(train.step, train["data_wait_seconds"] / train["seconds"].clip(min=1e-9))
    return {name: series for name, series in found.items() if series}


def _environment(environment: dict[str, Any]) -> dict[str, str]:
    """What a reader wants to know of versions and hardware, in the order in which it is shown."""
    packages = environment.get("packages")
    found = {key: environment.get(key) for key in ("device", "num_processes", "cuda", "cpus", "platform")}
    strategy = environment.get("strategy")
    if isinstance(strategy, dict):
        reason = strategy.get("reason")
        found["strategy"] = f"{strategy.get('taken')}{f' ({reason})' if reason else ''}"
    found |= {key: environment.get(key) for key in ("seed", "date", "mtr", "python")}
    found |= packages if isinstance(packages, dict) else {}
    accepted = environment.get("accepted_changes")
    if isinstance(accepted, list) and accepted:
        changes = [c for one in accepted if isinstance(one, dict) for c in _list(one.get("changes"))]
        found["changed while resuming"] = "; ".join(map(str, changes))
    return {str(key): str(value)[:300] for key, value in found.items() if value is not None}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of their paths, as many as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [printable(name).replace("\n", " ").replace("\t", " ") or "/" for name in names]


def without_secrets(value: Any) -> Any:
    """Access tokens, by their form or because they are set here, are left out wherever they may have got in."""
    own = [text for name in _TOKEN_VARIABLES if len(text := os.environ.get(name, "")) >= 8]
    pattern = re.compile("|".join([_TOKENS.pattern, *map(re.escape, own)]))

    def clean(item: Any) -> Any:
        if isinstance(item, str):
            valid = item.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair cannot be written
            return pattern.sub("[access token]", valid)
        if isinstance(item, dict):
            return {clean(key): clean(kept) for key, kept in item.items()}
        return [clean(kept) for kept in item] if isinstance(item, (list, tuple)) else item

    return clean(value)

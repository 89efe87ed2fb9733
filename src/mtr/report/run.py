"""The folder of a run, read: nothing is written, and what is missing or damaged is said."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtr.console import first_few, shorten
from mtr.errors import UserError, one_line
from mtr.recipe.plain_yaml import read_yaml
from mtr.report.metrics import Metrics, read_metrics
from mtr.report.outcome import Outcome, Plan, last_step, outcome_of, planned, read_state
from mtr.report.played import Played, read_played
from mtr.store.checkpoints import steps_in
from mtr.store.marker import NAME, read_marker


@dataclass(frozen=True)
class Rejects:
    """Bad rows that the run skipped."""

    number: int = 0
    examples: tuple[str, ...] = ()
    """The first reasons, with their rows."""


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    folder: Path
    recipe: dict[str, Any]
    """As plain data, defaults included; empty if it is missing."""
    environment: dict[str, Any]
    metrics: Metrics
    played: Played
    rejects: Rejects
    plan: Plan
    outcome: Outcome
    totals: dict[str, Any] = field(default_factory=dict)
    """Counts of the whole run, as `mtr.prepare.counts.Counts` names them; empty if they are not known."""
    totals_at: int | None = None
    """The step that they are of, where that is not the last one."""
    missing: tuple[str, ...] = ()
    """What the folder lacks, in words."""


def read_run(folder: Path) -> Run:
    """
    Raises:
        UserError: it is no folder of a run, or a file in it cannot be read.
    """
    check_folder(folder)
    marker = read_marker(folder)
    assert marker is not None
    recipe = _recipe(folder / "recipe.yaml")
    environment = _environment(folder / "environment.json")
    metrics = read_metrics(folder / "metrics.jsonl")
    played = read_played(folder / "generations.jsonl")
    plan = planned(recipe, metrics)
    outcome = outcome_of(folder, marker, recipe, metrics, plan)
    totals, at = (metrics.totals, None) if metrics.totals else _totals_of_checkpoint(folder)
    missing = tuple(_missing(recipe, environment, metrics, played, outcome, bool(totals), at))
    rejects = _rejects(folder / "rejects.jsonl")
    return Run(folder, recipe, environment, metrics, played, rejects, plan, outcome, totals, at, missing)


def check_folder(folder: Path) -> None:
    """
    Raises:
        UserError: nothing shows it to be the folder of a run; the message names the runs beside or in it.
    """
    if not os.path.exists(folder):  # a name that is too long, too
        raise UserError(f"{shorten(str(folder), 300)}: no such folder; name the training.output_dir of a run")
    if not folder.is_dir():
        raise UserError(f"{folder}: a file; name the folder of a run, the training.output_dir of its recipe")
    if (folder / NAME).is_file():
        return
    if (folder.absolute().parent / NAME).is_file():
        raise UserError(f"{folder}: a folder in a run; name the run itself, {folder.absolute().parent}")
    try:
        runs = sorted(path.parent.name for path in folder.glob(f"*/{NAME}"))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror or error}") from None
    inside = f"; the runs in it are {first_few(runs)}" if runs else ""
    raise UserError(f"{folder}: has no {NAME}, so nothing shows that it is a run of mtr{inside}")


def _recipe(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        raw = read_yaml(path, factor=2)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as the recipe of a run: {one_line(error)}; restore it") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not the recipe of a run, which is a mapping of sections; restore it")
    return raw


def _environment(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    if not path.is_file():
        raise UserError(f"{path}: not a file; restore it, or remove it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {one_line(error)}; restore it, or remove it") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; restore it, or remove it")
    return found


def _rejects(path: Path) -> Rejects:
    if not path.is_file():
        return Rejects()
    number = 0
    examples: list[str] = []
    with path.open("rb") as file:
        for raw in file:
            try:
                reason = json.loads(raw)["reason"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            number += 1
            if len(examples) < 5:
                examples.append(str(reason)[:300])
    return Rejects(number, tuple(examples))


def _totals_of_checkpoint(folder: Path) -> tuple[dict[str, Any], int | None]:
    """Of the newest checkpoint that can be read."""
    for step in reversed(steps_in(folder)):
        counts = read_state(folder, step).get("counts")
        if isinstance(counts, dict):
            return counts, step
    return {}, None


def by_reason(totals: dict[str, Any], name: str) -> dict[str, int]:
    """One of the counters of the totals, the most frequent reason first; what is damaged in it is left out."""
    found = totals.get(name)
    pairs = found.items() if isinstance(found, dict) else ()
    return dict(Counter({str(k): v for k, v in pairs if type(v) is int and v > 0}).most_common())


def _missing(
    recipe: dict[str, Any],
    environment: dict[str, Any],
    metrics: Metrics,
    played: Played,
    outcome: Outcome,
    has_totals: bool,
    totals_at: int | None,
) -> list[str]:
    said = [] if recipe else ["recipe.yaml is missing: its settings are not known"]
    said += [] if environment else ["environment.json is missing: versions and hardware are not known"]
    if metrics.damaged:
        said.append(f"{metrics.damaged:,} lines of metrics.jsonl cannot be read and are left out")
    if metrics.is_cut and outcome.state != "running":
        said.append("the last line of metrics.jsonl is incomplete and is left out")
    if len(metrics.train) and outcome.steps > (logged := last_step(metrics)):
        said.append(f"no line tells of the steps after {logged:,}: curves and results are those up to it")
    if metrics.repeated:
        said.append(f"{metrics.repeated:,} lines of metrics.jsonl were written again later; the later ones are shown")
    if len(metrics.train) and not has_totals:
        said.append("what was not trained is not known: metrics.jsonl has no totals, and there is no checkpoint")
    elif totals_at is not None:
        said.append(f"what was not trained is that of checkpoint-{totals_at}")
    if len(metrics.train) and not len(metrics.evals):
        asked = isinstance(data := recipe.get("data"), dict) and (data.get("eval") or data.get("eval_fraction"))
        is_over = outcome.state == "finished" or not recipe
        why = ": the recipe has no data.eval" if recipe and not asked else "" if is_over else " yet"
        said.append(f"no evaluation{why}")
    if played.damaged:
        said.append(f"{played.damaged:,} lines of generations.jsonl cannot be read and are left out")
    if played.before and not played.after and len(metrics.train):
        said.append("no conversations played after training yet")
    return said

"""What became of a run, told from its folder: finished, at work, stopped by a signal, or ended without a word."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtr.report.metrics import Metrics
from mtr.store.checkpoints import steps_in
from mtr.store.lock import is_at_work
from mtr.store.marker import Marker

_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_MOST_STEPS = 2**53


@dataclass(frozen=True)
class Plan:
    """How many steps a run is to make."""

    steps: int | None = None
    """None: not known."""
    is_exact: bool = True
    """Whether the recipe names the number; otherwise it is told from the epochs done so far."""


@dataclass(frozen=True)
class Outcome:
    state: str
    """finished, running, stopped, failed, or empty (no step is logged)."""
    text: str
    """In words."""
    steps: int = 0
    """Done, as far as lines and checkpoints tell."""
    seconds_left: float | None = None
    """Of a run at work, by the pace of its last steps."""


def planned(recipe: dict[str, Any], metrics: Metrics) -> Plan:
    """
    Args:
        recipe: of the run, as plain data.
    """
    training = recipe.get("training")
    training = training if isinstance(training, dict) else {}
    steps = training.get("max_steps")
    if type(steps) is int and 0 < steps <= _MOST_STEPS:
        return Plan(steps)
    epochs = training.get("num_train_epochs", 1)
    done = metrics.train["epoch"][-1] if len(metrics.train) else math.nan
    if not isinstance(epochs, (int, float)) or not 0 < epochs <= _MOST_STEPS or not done > 0:
        return Plan()
    wanted = min(epochs * metrics.train.step[-1] / done, _MOST_STEPS)
    return Plan(max(1, math.ceil(round(wanted, 6))), is_exact=False)


def outcome_of(folder: Path, marker: Marker, recipe: dict[str, Any], metrics: Metrics, plan: Plan) -> Outcome:
    checkpoints = steps_in(folder)
    training = recipe.get("training")
    training = training if isinstance(training, dict) else {}
    last = _last(metrics, checkpoints, training.get("logging_steps"))
    steps = _steps(last, plan)
    if is_at_work(folder):
        left = _seconds_left(metrics, plan)
        return Outcome("running", f"at work, {steps} done" if last else "at work, no step is logged yet", last, left)
    has_result = any(name in marker.files and (folder / name).is_file() for name in _WEIGHTS)
    if has_result and (plan.steps is None or not plan.is_exact or last >= plan.steps):
        return Outcome("finished", f"finished, {last:,} step{'' if last == 1 else 's'}", last)
    patience = training.get("early_stopping_patience")
    if has_result and type(patience) is int and patience > 0:
        why = f"eval loss did not improve in {patience} evaluations"
        return Outcome("finished", f"finished early after {steps}: {why}", last)
    if not last and not len(metrics.train):
        return Outcome("empty", "no step is logged")
    kept = f"checkpoint-{checkpoints[-1]} is the newest" if checkpoints else "there is no checkpoint"
    if name := _stopped_by(folder, checkpoints, last):
        return Outcome("stopped", f"stopped by {name} after {steps}; continue with --resume", last)
    if metrics.nonfinite_last and last == last_step(metrics):
        text = f"ended after {steps}, the last {metrics.nonfinite_last} without a finite loss or gradient"
        return Outcome("failed", f"{text}; {kept}", last)
    older = "; the result in the folder is that of an earlier end" if has_result else ""
    return Outcome("failed", f"ended after {steps}, by an error or killed; {kept}{older}", last)


def last_step(metrics: Metrics) -> int:
    """The last step that a line tells of."""
    return int(max((lines.step[-1] for lines in (metrics.train, metrics.evals) if len(lines)), default=0))


def _last(metrics: Metrics, checkpoints: list[int], logging_steps: object) -> int:
    """The last step that is known of: of those after the last line, which are not logged, a checkpoint may tell."""
    last = last_step(metrics)
    every = logging_steps if type(logging_steps) is int else 1
    return max([last, *(step for step in checkpoints if step < last + every)])


def _steps(last: int, plan: Plan) -> str:
    if plan.steps is None:
        return f"{last:,} step{'' if last == 1 else 's'}"
    return f"{last:,} of {'' if plan.is_exact else 'about '}{plan.steps:,} steps"


def _seconds_left(metrics: Metrics, plan: Plan) -> float | None:
    recent = metrics.train["seconds"][-20:]
    recent = recent[~(recent != recent)]
    if plan.steps is None or not len(recent):
        return None
    return float(max(0, plan.steps - last_step(metrics)) * recent.mean())


def _stopped_by(folder: Path, checkpoints: list[int], last: int) -> str | None:
    """The signal that ended the run, if its newest checkpoint is that of its end."""
    if not checkpoints or checkpoints[-1] < last:
        return None
    number = read_state(folder, checkpoints[-1]).get("stopped_by")
    try:
        return signal.Signals(number).name if isinstance(number, int) else None
    except ValueError:
        return f"signal {number}"


def read_state(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint keeps of the run's state; empty if it cannot be read."""
    path = folder / f"checkpoint-{step}" / "training_state.json"
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}

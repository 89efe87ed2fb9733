"""Metrics for experiment trackers, through Accelerate. Nothing leaves the machine unless asked for.

metrics.jsonl is always written; a tracker gets the same numbers, as train/loss, eval/loss and so on. W&B, Comet,
ClearML and SwanLab are started offline unless their own environment variable says otherwise. Files of a tracker are in
`output_dir`, but for ClearML's, which has one folder for all of a user's runs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mtr.errors import UserError
from mtr.recipe.sections import Recipe

_OFFLINE = {
    "wandb": ("WANDB_MODE", "offline"),
    "comet_ml": ("COMET_START_ONLINE", "0"),
    "clearml": ("CLEARML_OFFLINE_MODE", "1"),
    "swanlab": ("SWANLAB_MODE", "offline"),
}
_PLACES = {
    "mlflow": ("MLFLOW_TRACKING_URI", "sqlite:///{}/mlflow.db"),
    "trackio": ("TRACKIO_DIR", "{}/trackio"),
    "comet_ml": ("COMET_OFFLINE_DIRECTORY", "{}/comet"),
}
"""Environment variables that name a tracker's folder; `{}` is output_dir."""


def check_trackers(trackers: Sequence[str]) -> None:
    """
    Raises:
        UserError: a package is missing; the message holds the line that installs it.
    """
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise UserError(f"training.report_to: {', '.join(missing)} is not installed; pip install {packages}")


def start_tracking(accelerator: Accelerator, recipe: Recipe, start: int) -> None:
    """Begin on the main process.

    Args:
        start: the step that the run continues from.
    """
    trackers = recipe.training.report_to
    if not trackers:
        return
    output_dir = Path(recipe.training.output_dir).absolute()
    for name in trackers:
        if name in _OFFLINE:
            os.environ.setdefault(*_OFFLINE[name])
    for tracker, (variable, place) in _PLACES.items():
        if tracker in trackers:
            os.environ.setdefault(variable, place.format(output_dir))
    options = {name: kept for name, kept in _options(output_dir, start).items() if name in trackers}
    config = {key: value for key, value in flat(recipe.model_dump()).items() if isinstance(value, (int, float, str))}
    accelerator.init_trackers("mtr", config, options)


def _options(output_dir: Path, start: int) -> dict[str, dict[str, Any]]:
    """Arguments of the trackers that are told their folder when they start; aim and tensorboard get it as a matter of
    course.
    """
    return {
        "tensorboard": {"purge_step": start + 1} if start else {},
        "wandb": {"dir": str(output_dir), "name": output_dir.name},
        "trackio": {"name": output_dir.name},
        "dvclive": {
            "dir": str(output_dir / "dvclive"),
            "resume": bool(start),
            "dvcyaml": None,  # else in the working folder
            "save_dvc_exp": False,  # else in the git repository of the working folder
        },
        "swanlab": {"logdir": str(output_dir / "swanlog")},
    }


def track(accelerator: Accelerator, kind: str, line: dict[str, Any]) -> None:
    """The numbers of a line of metrics.jsonl, as `kind/name`; not the totals, whose reasons are no names of metrics."""
    numbers = {
        f"{kind}/{key.removeprefix('eval_')}": value
        for key, value in flat(line).items()
        if isinstance(value, (int, float)) and key != "step" and not key.startswith("totals.")
    }
    accelerator.log(numbers, step=line["step"])


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flattened: dict[str, Any] = {}
    for key, item in value.items():
        flattened |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flattened

"""The run's folder: whether a run may begin or go on in it, and what it holds from the beginning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtr.errors import SaveError, UserError
from mtr.files import replace_file, write_json
from mtr.recipe.changes import differing_keys
from mtr.recipe.loading import load_saved_recipe
from mtr.recipe.sections import Recipe
from mtr.training import checkpoint
from mtr.training.environment import environment
from mtr.training.faults import save_problem
from mtr.training.metrics import MetricsFile
from mtr.training.playing import Played
from mtr.training.state import Summary


def check_output_dir(
    recipe: Recipe, output_dir: Path, resume: bool, overwrite: bool
) -> tuple[Recipe, Path | None, list[str]]:
    """The recipe with the date of the run that is resumed, the checkpoint to go on from, and what to say about it."""
    training = recipe.training
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"training.output_dir: {existing} is a file, so {output_dir} cannot be a folder")
    for key in ("load_best_at_end", "early_stopping_patience"):
        if getattr(training, key) and not (recipe.data.eval or recipe.data.eval_fraction):
            raise UserError(f"training.{key} needs data.eval")
    filled = output_dir.is_dir() and any(output_dir.iterdir())
    if filled and not resume and not overwrite:
        raise UserError(
            f"training.output_dir: {output_dir} is not empty; go on with --resume, replace the run with --overwrite, "
            "or name another folder"
        )
    good, notes = checkpoint.find_checkpoint(output_dir) if resume and filled else (None, [])
    saved_file = output_dir / "recipe.yaml"
    if good is None or not saved_file.exists():
        return recipe, None, []
    saved = load_saved_recipe(saved_file)
    recipe = recipe.model_copy(update={"date": recipe.date or saved.date})
    if different := differing_keys(saved, recipe):
        raise UserError(
            f"{good} was made with another recipe; these keys differ: {', '.join(different)}. "
            "Restore them, or start anew with --overwrite"
        )
    return recipe, good, notes


def begin_files(recipe: Recipe, process: Any, summary: Summary, overwrite: bool) -> MetricsFile:
    output_dir = Path(recipe.training.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if overwrite:
            checkpoint.remove_run(output_dir)
        replace_file(output_dir / "recipe.yaml", recipe.dump())
        described = environment(recipe.training.seed, process.device, process.num_processes, str(recipe.date))
        write_json(output_dir / "environment.json", described)
        return MetricsFile(output_dir / "metrics.jsonl", summary.steps, summary.evaluated_at)
    except OSError as error:
        raise SaveError(f"{output_dir} cannot be written: {save_problem(error, output_dir)}") from None


def write_played(output_dir: Path, step: int, played: list[Played]) -> None:
    """Add to generations.jsonl; what an earlier try wrote from this step on is replaced."""
    path = output_dir / "generations.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    kept = [line for line in lines if line and json.loads(line)["step"] < step]
    new = [write_json(None, {"step": step, **turn.as_row()}) for turn in played]
    replace_file(path, "".join(f"{line}\n" for line in [*kept, *new]))

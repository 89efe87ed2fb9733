"""The folder of a run: whether a run may start or continue in it, and its first files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from mtr.errors import SaveError, UserError
from mtr.files import replace_file, write_json
from mtr.recipe.changes import differing_keys
from mtr.recipe.loading import load_saved_recipe
from mtr.recipe.sections import Recipe
from mtr.training import checkpoint
from mtr.training.environment import environment
from mtr.training.faults import save_problem
from mtr.training.metrics import MetricsFile
from mtr.training.state import RunState


@dataclass(frozen=True)
class Folder:
    """Where a run works, and what it continues from."""

    recipe: Recipe
    """With the date of the run that is resumed."""
    resume_from: Path | None = None
    """The newest good checkpoint."""
    notes: tuple[str, ...] = ()
    """What to report: damaged checkpoints that were skipped."""

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.training.output_dir)

    @property
    def start(self) -> int:
        """Steps that are done already."""
        return checkpoint.step_of(self.resume_from) if self.resume_from else 0


def check_output_dir(recipe: Recipe, resume: bool, overwrite: bool) -> Folder:
    """Nothing is written here.

    Raises:
        UserError: the folder holds something else, or a run that this recipe cannot continue.
    """
    output_dir = Path(recipe.training.output_dir)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"training.output_dir: {existing} is a file, so {output_dir} cannot be a folder")
    for key in ("load_best_at_end", "early_stopping_patience"):
        if getattr(recipe.training, key) and not (recipe.data.eval or recipe.data.eval_fraction):
            raise UserError(f"training.{key} needs data.eval")
    filled = output_dir.is_dir() and any(output_dir.iterdir())
    if filled and not resume and not overwrite:
        raise UserError(
            f"training.output_dir: {output_dir} is not empty; continue with --resume, replace the run with "
            "--overwrite, or name another folder"
        )
    good, notes = checkpoint.find_checkpoint(output_dir) if resume and filled else (None, [])
    saved_file = output_dir / "recipe.yaml"
    if good is None or not saved_file.exists():
        return Folder(recipe)
    saved = load_saved_recipe(saved_file)
    recipe = recipe.model_copy(update={"date": recipe.date or saved.date})
    if different := differing_keys(saved, recipe):
        raise UserError(
            f"{good} was made with another recipe; these keys differ: {', '.join(different)}. "
            "Restore them, or start over with --overwrite"
        )
    return Folder(recipe, good, tuple(notes))


def begin_files(recipe: Recipe, accelerator: Accelerator, state: RunState, overwrite: bool) -> MetricsFile:
    """The folder with the resolved recipe and the environment; metrics of steps that will be redone are cut.

    Raises:
        SaveError: it cannot be written.
    """
    output_dir = state.output_dir
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if overwrite:
            checkpoint.remove_run(output_dir)
        replace_file(output_dir / "recipe.yaml", recipe.dump())
        described = environment(recipe.training.seed, accelerator.device, accelerator.num_processes, str(recipe.date))
        write_json(output_dir / "environment.json", described)
        return MetricsFile(output_dir / "metrics.jsonl", state.steps, state.evaluated_at)
    except OSError as error:
        raise SaveError(f"{output_dir} cannot be written: {save_problem(error, output_dir)}") from None

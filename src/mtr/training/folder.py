"""The folder of a run: whether a run may start or continue in it, and its first files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from mtr.console import first_few
from mtr.errors import SaveError, UserError
from mtr.files import checksum_of, replace_file
from mtr.recipe.changes import differing_keys
from mtr.recipe.loading import load_saved_recipe
from mtr.recipe.placement import check_placement
from mtr.recipe.sections import Recipe
from mtr.store.checkpoints import NOT_OURS, find_checkpoint, is_unused, protected, remove_run, step_of
from mtr.store.marker import LOGS, NAME, RESULTS, Marker, read_marker
from mtr.store.problems import save_problem
from mtr.training.environment import Identity
from mtr.training.metrics import MetricsFile, describe_gaps
from mtr.training.state import RunState


@dataclass(frozen=True)
class Start:
    """How a run begins in a folder that may hold one already."""

    resume: bool = False
    """Continue from its newest checkpoint, if it has one."""
    accept_changes: bool = False
    """Continue even if data, template or weights have changed."""
    overwrite: bool = False
    """Replace it."""


@dataclass(frozen=True)
class Folder:
    """Where a run works, and what it continues from."""

    recipe: Recipe
    """With the date of the run that is resumed."""
    resume_from: Path | None = None
    """The newest good checkpoint."""
    marker: Marker = field(default_factory=Marker)
    """Of the run that is resumed, or of the new one."""
    overwrite: bool = False
    """Replace the run that is in it."""
    notes: tuple[str, ...] = ()
    """What to report: damaged checkpoints that were skipped, lines that are missing."""

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.training.output_dir)

    @property
    def start(self) -> int:
        """Steps that are done already."""
        return step_of(self.resume_from) if self.resume_from else 0


def check_before_locking(recipe: Recipe, how: Start) -> Marker | None:
    """What can be known without a lock: whether anything in the folder may be touched at all.

    Returns:
        The marker of the run in it, if there is one.

    Raises:
        UserError: the folder is in a dangerous place, or holds what is not provably a run of mtr.
    """
    output_dir = Path(recipe.training.output_dir)
    try:
        check_placement(recipe)
        existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise UserError(f"training.output_dir: {existing} is a file, so {output_dir} cannot be a folder")
        if is_unused(output_dir):
            return None
    except OSError as error:
        raise UserError(f"training.output_dir: {output_dir} cannot be used: {error.strerror or error}") from None
    marker = read_marker(output_dir)
    if marker is None:
        raise UserError(
            f"training.output_dir: {output_dir} is not empty and has no {NAME}, so nothing shows that it is a run of "
            "mtr, and nothing in it is touched; name another folder"
        )
    if not how.resume and not how.overwrite:
        raise UserError(
            f"training.output_dir: {output_dir} is not empty; continue with --resume, replace the run with "
            "--overwrite, or name another folder"
        )
    return marker


def check_output_dir(recipe: Recipe, how: Start) -> Folder:
    """Whether this recipe may start or continue in the folder. Nothing is written here.

    Raises:
        UserError: the folder holds something else, or a run that this recipe cannot continue.
    """
    marker = check_before_locking(recipe, how)
    for key in ("load_best_at_end", "early_stopping_patience"):
        if getattr(recipe.training, key) and not (recipe.data.eval or recipe.data.eval_fraction):
            raise UserError(f"training.{key} needs data.eval")
    output_dir = Path(recipe.training.output_dir)
    fresh = (f"no checkpoint in {output_dir}: starting from the beginning",) if how.resume else ()
    if marker is None:
        return Folder(recipe, notes=fresh)
    good, notes = find_checkpoint(output_dir, marker) if how.resume else (None, [])
    if good is None:
        _check_nothing_in_the_way(protected(output_dir, marker), output_dir)
        marker = marker.successor() if how.overwrite else marker
        return Folder(recipe, marker=marker, overwrite=how.overwrite, notes=fresh)
    saved_file = output_dir / "recipe.yaml"
    if not saved_file.exists():
        raise UserError(
            f"{saved_file} is missing, so it is not known whether {good.name} fits this recipe; restore it, or start "
            "over with --overwrite"
        )
    saved = load_saved_recipe(saved_file)
    foreign = marker.foreign(output_dir, (*LOGS, *RESULTS))
    _check_nothing_in_the_way([f"{name} {NOT_OURS}" for name in foreign], output_dir)
    recipe = recipe.model_copy(update={"date": recipe.date or saved.date})
    if different := differing_keys(saved, recipe):
        raise UserError(
            f"{good} was made with another recipe; these keys differ: {', '.join(different)}. "
            "Restore them, or start over with --overwrite"
        )
    gaps = describe_gaps(output_dir / "metrics.jsonl", step_of(good))
    return Folder(recipe, good, marker, notes=(*notes, *gaps))


def _check_nothing_in_the_way(problems: list[str], output_dir: Path) -> None:
    if problems:
        raise UserError(f"training.output_dir: in {output_dir}, {first_few(problems)}; move it to another folder first")


def begin_files(folder: Folder, recipe: Recipe, identity: Identity, state: RunState) -> MetricsFile:
    """The marker, then the resolved recipe and the environment; metrics of steps that will be redone are cut.

    Where the run starts from the beginning, what an earlier one logged is removed, and its result if it is overwritten.

    Raises:
        SaveError: it cannot be written.
    """
    output_dir = state.output_dir
    texts = {
        "recipe.yaml": recipe.dump(),
        "environment.json": json.dumps(identity.environment, indent=2, ensure_ascii=False) + "\n",
    }
    growing = {name: None for name in LOGS if name not in texts}
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        marker = folder.marker.with_files({**growing, **{name: checksum_of(text) for name, text in texts.items()}})
        marker.write(output_dir)
        if folder.resume_from is None:
            remove_run(output_dir, marker, marker.files if folder.overwrite else growing)
        for name, text in texts.items():
            replace_file(output_dir / name, text)
        return MetricsFile(output_dir / "metrics.jsonl", state.steps, state.evaluated_at)
    except OSError as error:
        raise SaveError(f"{output_dir} cannot be written: {save_problem(error, output_dir)}") from None

"""`mtr train`."""

from __future__ import annotations

from typing import Annotated

import typer

from mtr.cli.options import Overrides, RecipeFile
from mtr.cli.session import errors, load
from mtr.errors import UserError

EXAMPLES = """Examples:
  mtr train my.yaml  # one device
  mtr train my.yaml training.max_steps=20  # any key can be set
  mtr train my.yaml --num-processes 8  # 8 GPUs, the same gradients
  mtr train my.yaml --resume  # from the newest good checkpoint
"""


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest good checkpoint in output_dir.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="With --resume: continue even if data, template or weights changed."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes to start on this machine, one per GPU; default: this one."),
    ] = None,
) -> None:
    """Fine-tune the model of a recipe.

    Needs the model's weights and data. Adapter, metrics and the resolved recipe are written to training.output_dir, and
    nothing else is touched. A signal (Ctrl-C, SIGTERM) ends the run with a checkpoint.
    """
    with errors():
        if resume and overwrite:
            raise UserError(
                "--resume and --overwrite exclude each other: one continues the run in output_dir, one replaces it"
            )
        if accept_changes and not resume:
            raise UserError("--accept-changes goes with --resume: a new run has nothing that could have changed")
        if num_processes is not None:
            from mtr.training.launch import launch

            options = {"--resume": resume, "--accept-changes": accept_changes, "--overwrite": overwrite}
            given = [name for name, is_given in options.items() if is_given]
            raise typer.Exit(launch(num_processes, recipe, overrides or [], given))
        from mtr.recipe.placement import check_placement
        from mtr.recipe.places import located

        loaded = load(recipe, overrides, needed="weights")
        with located(recipe, overrides):
            check_placement(loaded, recipe)
        from mtr.training.loop import train as run

        summary = run(loaded, resume=resume, overwrite=overwrite, accept_changes=accept_changes)
    if summary.stopped_by:
        raise typer.Exit(128 + summary.stopped_by)

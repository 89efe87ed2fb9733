"""`mtr train`."""

from __future__ import annotations

from typing import Annotated

import typer

from mtr.cli.options import Overrides, RecipeFile
from mtr.cli.session import errors, load
from mtr.errors import UserError


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in output_dir.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Processes to start on this machine, one per GPU; default: this one only.")
    ] = None,
) -> None:
    """Fine-tune the model of a recipe. Adapter, metrics and the resolved recipe are written to training.output_dir."""
    with errors():
        if resume and overwrite:
            raise UserError(
                "--resume and --overwrite exclude each other: one continues the run in output_dir, one replaces it"
            )
        if num_processes is not None:
            from mtr.training.launch import launch

            raise typer.Exit(launch(num_processes, recipe, overrides or [], resume, overwrite))
        loaded = load(recipe, overrides)
        from mtr.training.loop import train as run

        summary = run(loaded, resume=resume, overwrite=overwrite)
    if summary.stopped_by:
        raise typer.Exit(128 + summary.stopped_by)

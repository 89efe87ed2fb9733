"""`mtr verify`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mtr.cli.options import STDOUT, JsonFile, Overrides, RecipeFile, with_attention, write_result
from mtr.cli.session import errors, load
from mtr.errors import UserError


def verify(
    recipe: RecipeFile,
    overrides: Overrides = None,
    conversations: Annotated[
        int, typer.Option(min=1, help="Number of conversations, from the start of data.train.")
    ] = 4,
    dtype: Annotated[str, typer.Option(help="Compute in float64, float32, bfloat16 or float16.")] = "float64",
    attention: Annotated[str | None, typer.Option(help="Attention backend to test instead of the recipe's.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Prove on your model and data that one pass gives the loss and gradients of one pass per turn.

    Exits with 1 if it does not.
    """
    with errors():
        loaded = load(recipe, overrides)
        from mtr.checks.verify import TOLERANCE
        from mtr.checks.verify import verify as run
        from mtr.cli.views.verify import show_verification
        from mtr.console import console

        if dtype not in TOLERANCE:
            raise UserError(f"--dtype: {dtype!r} is not one of {', '.join(TOLERANCE)}")
        if attention is not None:
            loaded = with_attention(loaded, attention)
        result = run(loaded, conversations, dtype)
        if json_file != STDOUT:
            show_verification(result, console(sys.stdout))
        write_result(result, json_file)
    if not result["passed"]:
        raise typer.Exit(1)

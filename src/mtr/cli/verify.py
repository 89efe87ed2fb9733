"""`mtr verify`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mtr.cli.options import (
    DTYPES,
    STDOUT,
    JsonFile,
    Overrides,
    RecipeFile,
    check_attention,
    check_choice,
    check_target,
    write_result,
)
from mtr.cli.session import errors, load


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
        check_choice("--dtype", dtype, DTYPES)
        if attention is not None:
            check_attention(attention)
        check_target("--json", json_file)
        loaded = load(recipe, overrides, needed="weights")
        from mtr.checks.verify import verify as run
        from mtr.cli.views.verify import show_verification
        from mtr.console import console

        if attention is not None:
            loaded = loaded.replace(model={"attention": attention})
        result = run(loaded, conversations, dtype)
        if json_file != STDOUT:
            show_verification(result, console(sys.stdout))
        write_result(result, json_file)
    if not result["passed"]:
        raise typer.Exit(1)

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
    check_spared,
    check_target,
    files_of,
    write_result,
)
from mtr.cli.session import errors, load

EXAMPLES = """Examples:
  mtr verify my.yaml  # 4 conversations in float64
  mtr verify my.yaml --dtype bfloat16  # as it is trained
  mtr verify my.yaml --attention flex --conversations 16
  mtr verify my.yaml --json | jq .passed
"""


def verify(
    recipe: RecipeFile,
    overrides: Overrides = None,
    conversations: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of conversations, from the start of data.train.")
    ] = 4,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Compute in float64, float32, bfloat16 or float16.")
    ] = "float64",
    attention: Annotated[
        str | None, typer.Option(metavar="BACKEND", help="Attention backend to test instead of the recipe's.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Prove on your model and data that one pass gives the loss and gradients of one pass per turn.

    Needs the model's weights, on the CPU or a GPU. Each conversation goes through the model as one tree, then turn by
    turn as plain sequences; loss and every gradient are compared. Exits with 1 if they differ by more than rounding.
    """
    with errors():
        check_choice("--dtype", dtype, DTYPES)
        if attention is not None:
            check_attention(attention)
        check_target("--json", json_file)
        loaded = load(recipe, overrides, needed="weights")
        check_spared({"--json": json_file}, files_of(recipe, loaded))
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

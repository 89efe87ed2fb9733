"""Arguments and options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtr.cli.session import writing
from mtr.errors import UserError
from mtr.files import write_json

if TYPE_CHECKING:
    from mtr.recipe.sections import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Recipe keys to override, e.g. training.max_steps=20.", show_default=False
    ),
]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="[FILE]", help="Write the result as JSON, to standard output if no FILE is given."),
]
STDOUT = "-"
"""The value of `--json` without a FILE: JSON is then all that standard output holds."""


def write_result(result: dict[str, Any], json_file: str | None) -> None:
    """Do what `--json` asks for.

    Raises:
        UserError: the file cannot be written.
    """
    if json_file == STDOUT:
        print(write_json(None, result))
    elif json_file is not None:
        with writing("--json", json_file):
            write_json(Path(json_file), result)


def with_attention(recipe: Recipe, backend: str) -> Recipe:
    """The recipe with the backend of `--attention`.

    Raises:
        UserError: there is no such backend.
    """
    from mtr.recipe.sections import BACKENDS

    if backend not in BACKENDS:
        raise UserError(f"--attention: {backend!r} is not one of {', '.join(BACKENDS)}")
    return recipe.replace(model={"attention": backend})

"""Arguments and options that several commands share, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mtr.cli.session import writing
from mtr.console import shorten
from mtr.errors import UserError
from mtr.files import write_json

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


DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Values of `--dtype` of verify; the keys of `mtr.checks.verify.TOLERANCE`, which takes seconds to import."""


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """
    Raises:
        UserError: the value is not one of the choices.
    """
    if value not in choices:
        raise UserError(f"{option}: {shorten(value, 80)!r} is not one of {', '.join(choices)}")


def check_target(option: str, file: str | Path | None) -> None:
    """Whether a file can be written, before the work whose result it is for; its folder is made if need be.

    Raises:
        UserError: it cannot.
    """
    if file is None or file == STDOUT:
        return
    path = Path(file).absolute()
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    if path.is_dir():
        problem = "it is a folder"
    elif not folder.is_dir():
        problem = f"{folder} is not a folder"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = f"{path if path.exists() else folder} is not writable"
    else:
        return
    raise UserError(f"{option}: {file} cannot be written: {problem}")


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


def check_attention(backend: str) -> None:
    """
    Raises:
        UserError: there is no such backend.
    """
    from mtr.recipe.sections import BACKENDS

    check_choice("--attention", backend, BACKENDS)

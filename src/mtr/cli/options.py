"""Arguments and options that several commands share, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtr.cli.completion import complete_override
from mtr.cli.session import writing
from mtr.console import shorten
from mtr.errors import UserError
from mtr.files import write_json

if TYPE_CHECKING:
    from mtr.recipe.sections import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Recipe keys to override, e.g. training.max_steps=20.",
        show_default=False,
        autocompletion=complete_override,
    ),
]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="[FILE]", help="Write the result as JSON, to standard output if no FILE is given."),
]
STDOUT = "-"
"""The value of `--json` without a FILE: JSON is then all that standard output holds."""


PAGES = (".html", ".htm")
PICTURES = (".png", ".svg", ".pdf")
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
    try:
        problem = _why_not_writable(Path(file).absolute())
    except OSError as error:  # a name that is too long
        problem = error.strerror or str(error)
    if problem is not None:
        raise UserError(f"{option}: {shorten(str(file), 300)} cannot be written: {problem}")


def _why_not_writable(path: Path) -> str | None:
    if "\0" in str(path):
        return "no path holds a NUL character"
    if path.is_dir():
        return "it is a folder"
    if path.is_symlink() and not path.exists():
        return "it is a link to nothing"
    if path.exists() and not path.is_file():  # replaced by a file, a device would be gone
        return "it is no regular file"
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    if not folder.is_dir():
        return f"{folder} is not a folder"
    needed = (path, path.resolve().parent) if path.exists() else (folder,)  # a file is replaced by a new one
    return next((f"{one} is not writable" for one in needed if not os.access(one, os.W_OK)), None)


def check_suffix(option: str, file: Path | None, suffixes: Sequence[str]) -> None:
    """
    Raises:
        UserError: the file's name ends otherwise.
    """
    known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
    if file is not None and file.suffix not in suffixes:
        raise UserError(f"{option}: {shorten(str(file), 300)} must end in {known}")
    named = os.path.realpath(file) if file is not None and os.path.islink(file) else ""
    if named and not named.endswith(tuple(suffixes)):
        raise UserError(f"{option}: {file} is a link to {named}, which does not end in {known}; name another file")


def check_spared(targets: Mapping[str, str | Path | None], inputs: Iterable[Path]) -> None:
    """Whether none of the files that will be replaced is one that is read, or is kept with those.

    Args:
        targets: the files by their options.
        inputs: files, and folders, of which pages and pictures alone may be replaced.

    Raises:
        UserError: one of them would be destroyed.
    """
    read = list(inputs)
    for option, file in targets.items():
        if file is None or file == STDOUT or not (path := Path(file).resolve()).exists():
            continue
        for one in read:
            is_result = path.suffix in (*PAGES, *PICTURES)
            kept_in = not is_result and os.path.isdir(one) and path.is_relative_to(one.resolve())
            if kept_in or (os.path.isfile(one) and path.samefile(one)):
                where = f"belongs to {one}" if kept_in else "is read here"
                raise UserError(f"{option}: {file} {where}, and would be destroyed; name another file")


def files_of(path: Path, recipe: Recipe) -> Iterator[Path]:
    """What a recipe names and a result must not replace: itself, model, adapter, data, and the folder of the run."""
    from mtr.recipe.data_files import files_matching, is_pattern

    yield path
    yield from (Path(recipe.model.name_or_path), Path(recipe.training.output_dir))
    if recipe.lora and recipe.lora.init_from:
        yield Path(recipe.lora.init_from)
    for source in (*recipe.data.train, *recipe.data.eval):
        is_one = os.path.exists(source.path) or not is_pattern(source.path)
        yield from (Path(source.path),) if is_one else files_matching(source.path)


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

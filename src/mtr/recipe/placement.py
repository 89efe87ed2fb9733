"""Where a run may write: never into, around or over something that is the user's.

A folder is compared by what it is on disk, so a symbolic link, `..` or a second mount of it makes no difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mtr.errors import UserError
from mtr.recipe.data_files import is_pattern
from mtr.recipe.sections import Recipe, Source


def check_placement(recipe: Recipe, recipe_file: Path | None = None) -> None:
    """Refuse an output_dir in which a run could harm what it reads, or what is not its own.

    Args:
        recipe_file: where the recipe was read from; output_dir may be a folder inside the recipe's, not the recipe's
            own folder or one above it.

    Raises:
        UserError: names the folder that is in danger.
    """
    output_dir = Path(recipe.training.output_dir)
    try:
        dangers = [*_system_folders(output_dir), *_folders_read(recipe, output_dir, recipe_file)]
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"training.output_dir: {output_dir} cannot be used: {error.strerror or error}") from None
    if dangers:
        raise UserError(f"training.output_dir: {output_dir} {dangers[0]}; name a new folder of its own")


def _system_folders(output_dir: Path) -> Iterator[str]:
    for name, folder in (("the home folder", _home()), ("the working folder", Path.cwd())):
        if folder is not None and _is_or_contains(output_dir, folder):
            yield _relation(output_dir, folder, name)
    if (output_dir / ".git").exists():
        yield "is the root of a git repository"


def _folders_read(recipe: Recipe, output_dir: Path, recipe_file: Path | None) -> Iterator[str]:
    """What the run reads: folders of weights wholly, folders of data as far as they are searched for files."""
    if recipe_file is not None and _is_or_contains(output_dir, folder := recipe_file.absolute().parent):
        yield _relation(output_dir, folder, "the folder of the recipe")
    named = {"model.name_or_path": recipe.model.name_or_path}
    if recipe.lora and recipe.lora.init_from:
        named["lora.init_from"] = recipe.lora.init_from
    for key, name in named.items():
        folder = Path(name).expanduser()
        if folder.is_dir() and (_is_or_contains(output_dir, folder) or _is_or_contains(folder, output_dir)):
            yield _relation(output_dir, folder, f"the folder of {key}")
    for key, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        for source in sources:
            yield from _data_in_danger(output_dir, source, key)


def _data_in_danger(output_dir: Path, source: Source, key: str) -> Iterator[str]:
    folder, searched = _data_folder(source)
    if folder is None:
        return
    if _is_or_contains(output_dir, folder):
        yield _relation(output_dir, folder, f"the folder of {key}")
    elif searched and _is_or_contains(folder, output_dir):
        yield f"is inside {folder}, which {key} searches for data files: the run's own files would be read as data"


def _data_folder(source: Source) -> tuple[Path | None, bool]:
    """The folder that a local source is in, and whether folders inside it are searched too; None for the Hub."""
    path = Path(source.path).expanduser()
    if is_pattern(source.path) and not path.exists():
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if is_pattern(part))
        return Path(*parts[:first]) if first else Path.cwd(), "**" in parts or first < len(parts) - 1
    if path.is_dir():
        return path, True
    return (path.parent, False) if path.is_file() else (None, False)


def _relation(output_dir: Path, folder: Path, name: str) -> str:
    same = os.path.realpath(output_dir) == os.path.realpath(folder)
    inside = not same and not _is_or_contains(output_dir, folder)
    shown = name if str(folder) in name else f"{name} ({folder})"
    return f"is {shown}" if same else f"is inside {shown}" if inside else f"contains {shown}"


def _is_or_contains(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer` or lies inside it, by what they are on disk."""
    outer_path, inner_path = Path(os.path.realpath(outer)), Path(os.path.realpath(inner))
    if outer_path == inner_path or outer_path in inner_path.parents:
        return True
    if not outer_path.exists():
        return False
    return any(folder.exists() and folder.samefile(outer_path) for folder in (inner_path, *inner_path.parents))


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # no home folder is known
        return None

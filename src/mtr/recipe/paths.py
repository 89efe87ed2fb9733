"""Local paths in a recipe: made absolute when it is loaded, and a model folder that does not exist is an error."""

from __future__ import annotations

import os
from pathlib import Path

from mtr.errors import UserError
from mtr.recipe.data_files import files_matching, is_pattern
from mtr.recipe.sections import Recipe


def resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make the paths of model, data and adapter absolute: looked up in the working directory, then in `folder`.

    `~` is the home folder in every path. Names that are found in neither folder, such as Hub ids, stay as they are;
    so does a relative output_dir.
    """

    def resolve(name: str) -> str:
        name = os.path.expanduser(name)
        if os.path.isabs(name):
            return str(Path(name))
        return next((str(base / name) for base in (Path.cwd(), folder) if exists(base, name)), name)

    raw = recipe.model_dump()
    raw["model"]["name_or_path"] = resolve(recipe.model.name_or_path)
    raw["training"]["output_dir"] = os.path.expanduser(recipe.training.output_dir)
    if recipe.lora and recipe.lora.init_from:
        raw["lora"]["init_from"] = resolve(recipe.lora.init_from)
    for source in raw["data"]["train"] + raw["data"]["eval"]:
        source["path"] = resolve(source["path"])
    return Recipe.model_validate(raw)


def exists(folder: Path, name: str) -> bool:
    """Whether a file or folder in `folder` has this name, or matches it if it is a pattern such as `*.jsonl`."""
    if os.path.exists(folder / name):
        return True
    try:
        return is_pattern(name) and next(files_matching(str(folder / name)), None) is not None
    except (OSError, ValueError):  # ValueError: no valid pattern
        return False


def check_model_folder(name: str) -> str:
    """Refuse what is plainly a local path but does not exist, before the Hub is asked for it.

    Raises:
        UserError: no such folder.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name
    if looks_local and not os.path.isdir(name) and ("/" in name or name.startswith(".")):
        raise UserError(f"model.name_or_path: no such model folder: {name}")
    return name

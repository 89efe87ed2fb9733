"""Local paths in a recipe: made absolute when it is loaded, and a model folder that does not exist is an error."""

from __future__ import annotations

from pathlib import Path

from mtr.errors import UserError
from mtr.recipe.sections import Recipe


def resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make the paths of model, data and adapter absolute: looked up in the working directory, then in `folder`.

    Names that are found in neither, such as Hub ids, stay as they are.
    """

    def resolve(name: str) -> str:
        if Path(name).expanduser().is_absolute():
            return str(Path(name).expanduser())
        for base in (Path.cwd(), folder):
            if (base / name).exists() or (any(c in name for c in "*?[") and any(base.glob(name))):
                return str(base / name)
        return name

    raw = recipe.model_dump()
    raw["model"]["name_or_path"] = resolve(recipe.model.name_or_path)
    if recipe.lora and recipe.lora.init_from:
        raw["lora"]["init_from"] = resolve(recipe.lora.init_from)
    for source in raw["data"]["train"] + raw["data"]["eval"]:
        source["path"] = resolve(source["path"])
    return Recipe.model_validate(raw)


def check_model_folder(name: str) -> str:
    """Refuse what is plainly a local path but does not exist, before the Hub is asked for it.

    Raises:
        UserError: no such folder.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name
    if looks_local and not Path(name).is_dir() and ("/" in name or name.startswith(".")):
        raise UserError(f"model.name_or_path: no such model folder: {name}")
    return name

"""Loads a recipe from YAML and overrides, and checks it before anything heavy is imported.

    recipe.yaml + section.key=value overrides  ->  Recipe (frozen)  ->  output_dir/recipe.yaml

Unknown keys are errors that name the nearest known key; every error says line and column (`mtr.recipe.places`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from yaml.nodes import Node

from mtr.console import shorten
from mtr.errors import UserError, one_line
from mtr.recipe.paths import resolve_paths
from mtr.recipe.places import Places, overridden_keys
from mtr.recipe.plain_yaml import MOST_DEPTH, NotPlainError, compose_file, parse_yaml, read_yaml
from mtr.recipe.problems import explain, explain_in
from mtr.recipe.sections import Recipe, as_sources


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe; local paths in it become absolute.

    A relative path of the model, the data or an adapter is looked up in the working directory, then next to the recipe.

    Raises:
        UserError: the file, an override or a key is wrong; the message names it and the nearest known key.
    """
    path = Path(path)
    try:
        raw, root = compose_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except NotPlainError as error:
        raise UserError(f"{path}:{error.line}:{error.column}: not valid YAML: {error.problem}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe must be a mapping of sections (model, data, training, ...)")
    return resolve_paths(_validated(raw, overrides, str(path), root), path.resolve().parent)


def load_saved_recipe(path: Path) -> Recipe:
    """The recipe that a run saved: with absolute paths and every default.

    Raises:
        UserError: the file is damaged, or not one that this version of mtr understands.
    """
    try:
        return Recipe.model_validate(read_yaml(path, factor=2))  # with defaults and overrides
    except ValidationError as error:
        reason = explain(error)
    except (OSError, ValueError) as error:
        reason = one_line(error)
    raise UserError(f"{path}: not a recipe as mtr saved it: {reason}. Restore the file from a copy")


def recipe_of_tokenizer(name: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe with a tokenizer's folder or Hub id, and without data.

    Raises:
        UserError: an override or a key is wrong.
    """
    raw = {"model": {"name_or_path": name}, "data": {"train": "none"}, "training": {"output_dir": "none"}}
    return _validated(raw, overrides, name)


def _validated(raw: dict[str, Any], overrides: list[str] | None, name: str, root: Node | None = None) -> Recipe:
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        places = Places(root, overridden_keys(overrides or []))
        raise UserError(explain_in(name, error, places)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    shown = repr(shorten(override, 80))
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        raise UserError(f"{shown}: an override is written section.key=value")
    if len(parents) >= MOST_DEPTH:
        raise UserError(f"{shown}: the key has more than {MOST_DEPTH} parts")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        reason = error.problem if isinstance(error, NotPlainError) else one_line(error)
        raise UserError(f"{shown}: the value is not valid YAML; quote it ({reason})") from None
    at: Any = raw
    for depth, part in enumerate(parents):
        place: Any = _index(at, part, shown) if isinstance(at, list) else part
        below = at[place] if isinstance(at, list) else at.get(part)
        below = {} if below is None and isinstance(at, dict) else below
        if parents[:depth] == ["data"] and part in ("train", "eval"):
            below = as_sources(below)  # data.train.0.weight reaches into the short form
        if not isinstance(below, (dict, list)):
            raise UserError(f"{shown}: {part!r} is a plain value and has no keys")
        below = below.copy()  # an alias stands for the same value in other places, which stays as it is
        at[place] = below
        at = below
    at[_index(at, last, shown) if isinstance(at, list) else last] = value


def _index(items: list[Any], part: str, shown: str) -> int:
    if part.isascii() and part.isdecimal() and len(part) < 10 and int(part) < len(items):
        return int(part)
    raise UserError(f"{shown}: {shorten(part, 40)!r} is not an index into a list of {len(items)}")

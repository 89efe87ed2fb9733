"""Loads a recipe from YAML and overrides, and checks it before anything heavy is imported.

    recipe.yaml + section.key=value overrides  ->  Recipe (frozen)  ->  output_dir/recipe.yaml

Unknown keys are errors that name the nearest known key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mtr.errors import UserError, one_line
from mtr.recipe.paths import resolve_paths
from mtr.recipe.problems import explain
from mtr.recipe.sections import Recipe, as_sources


class _Loader(yaml.SafeLoader):
    """A SafeLoader that rejects duplicate keys and leaves dates such as 2026-01-31 as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _unique_keys(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice!r}", node.start_mark)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_keys)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe; local paths in it become absolute.

    A relative path of the model, the data or an adapter is looked up in the working directory, then next to the recipe.

    Raises:
        UserError: the file, an override or a key is wrong; the message names it and the nearest known key.
    """
    path = Path(path)
    try:
        raw = _load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe must be a mapping of sections (model, data, training, ...)")
    return resolve_paths(_validated(raw, overrides, str(path)), path.resolve().parent)


def load_saved_recipe(path: Path) -> Recipe:
    """The recipe that a run saved: with absolute paths and every default."""
    return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def recipe_of_tokenizer(name: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe with a tokenizer's folder or Hub id, and without data.

    Raises:
        UserError: an override or a key is wrong.
    """
    raw = {"model": {"name_or_path": name}, "data": {"train": "none"}, "training": {"output_dir": "none"}}
    return _validated(raw, overrides, name)


def _validated(raw: dict[str, Any], overrides: list[str] | None, name: str) -> Recipe:
    data = raw.get("data")
    if overrides and isinstance(data, dict):  # so that data.train.0.weight reaches into the short form
        raw["data"] = data | {key: as_sources(data[key]) for key in ("train", "eval") if key in data}
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{name}: {explain(error)}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{override!r}: an override is written section.key=value")
    try:
        value = _load_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not valid YAML; quote it") from None
    *parents, last = key.split(".")
    at: Any = raw
    for part in parents:
        if isinstance(at, list):
            at = _item(at, part, override)
        else:
            if at.get(part) is None:
                at[part] = {}
            at = at[part]
        if not isinstance(at, (dict, list)):
            raise UserError(f"{override!r}: {part!r} is a plain value and has no keys")
    if isinstance(at, list):
        _item(at, last, override)
        at[int(last)] = value
    else:
        at[last] = value


def _item(items: list[Any], part: str, override: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"{override!r}: {part!r} is not an index into a list of {len(items)}")
    return items[int(part)]

"""The smallest recipe and the quickstart's, changed and loaded from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mtr.errors import UserError
from mtr.recipe.loading import load_recipe
from mtr.recipe.sections import Recipe
from support.paths import QUICKSTART

MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "/m"},
    "data": {"train": [{"path": "/d.jsonl"}]},
    "training": {"output_dir": "/o"},
}


def quickstart_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe file in a folder, where its run will be, too: the quickstart, changed section by section."""
    raw: dict[str, Any] = {
        "model": {"name_or_path": str(QUICKSTART / "base"), "dtype": "float32"},
        "data": {"train": str(QUICKSTART / "train.jsonl")},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "conversations_per_step": 4,
            "learning_rate": 1e-3,
        },
    }
    for section, value in sections.items():
        merged = isinstance(value, dict) and isinstance(raw.get(section), dict)
        raw[section] = {**raw[section], **value} if merged else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def load(tmp_path: Path, raw: Any, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return load_recipe(path, list(overrides))


def refused(tmp_path: Path, raw: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, raw, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(**keys: Any) -> dict[str, Any]:
    """MINIMAL with `section__key=value` set."""
    raw: dict[str, Any] = yaml.safe_load(yaml.safe_dump(MINIMAL))
    for key, value in keys.items():
        section, _, name = key.partition("__")
        if name:
            raw.setdefault(section, {})[name] = value
        else:
            raw[section] = value
    return raw


def at(recipe: Recipe, key: str) -> Any:
    value: Any = recipe.model_dump()
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value

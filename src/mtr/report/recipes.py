"""What differs between the recipes of runs, and between what they were made from."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from mtr.recipe.sections import Recipe, Source

_LEFT_OUT = ("training.output_dir",)
"""Differs in all runs, and their names tell it."""
NOT_THERE = "not set"
_SOURCE_KEY = re.compile(r"data\.(?:train|eval)\.\d+\.(\w+)")
_ROWS = r"data\.(?:format|messages|tools|columns|on_bad_row|filter|group_by|eval_fraction)\b"
_OF_TOKENS = re.compile(rf"{_ROWS}|(?:template|thinking|train_on|date|loss)\b|sequence\.(?:max_length|overlong)\b")
"""Keys that decide which tokens a loss is the mean of, and with which weights."""
_OF_PLAYED = re.compile(rf"{_ROWS}|(?:template|thinking|date|generation)\b")
"""Keys that decide which conversations are played, and how."""
_MADE_FROM = {
    "template": "chat template",
    "tokenizer": "tokenizer",
    "weights": "base weights",
    "data": "training data",
    "evaluation": "evaluation data",
}


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; places in lists of mappings are keys, too."""
    if isinstance(value, dict) and value:
        pairs = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        pairs = [(str(place), item) for place, item in enumerate(value)]
    else:
        return {key: value}
    return {k: v for name, item in pairs for k, v in flat(item, f"{key}.{name}".strip(".")).items()}


def defaults() -> dict[str, Any]:
    """The keys of a recipe that have a default, flat."""
    required = {"model": {"name_or_path": "-"}, "data": {"train": "-"}, "training": {"output_dir": "-"}}
    known = flat(Recipe.model_validate(required).model_dump())
    return {key: value for key, value in known.items() if value != "-"}


def default_of(key: str, known: dict[str, Any]) -> Any:
    """The default of a key, in a list of sources too; `NOT_THERE` if it has none."""
    place = _SOURCE_KEY.fullmatch(key)
    if place and place[1] in Source.model_fields:
        field = Source.model_fields[place[1]]
        return NOT_THERE if field.is_required() else field.default
    return known.get(key, NOT_THERE)


def differences(recipes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The keys that differ, in the order of the recipe. Keys of each: key, values (one per run, as text), default.

    Args:
        recipes: as the runs saved them; an empty one is that of a run whose recipe is missing.
    """
    flattened = [flat(recipe) for recipe in recipes]
    known = defaults()
    keys = dict.fromkeys(key for recipe in flattened for key in recipe if key not in _LEFT_OUT)
    rows = []
    for key in sorted(keys, key=_section):
        values = [recipe.get(key, NOT_THERE) for recipe in flattened]
        if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
            rows.append({"key": key, "values": _texts(values), "default": _shown_default(key, known)})
    return rows


def own_settings(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """What a single recipe sets otherwise than the defaults. Keys of each: key, values (one), default."""
    known, rows = defaults(), []
    for key, value in flat(recipe).items():
        if key not in _LEFT_OUT and value not in (None, [], {}, default_of(key, known)):
            rows.append({"key": key, "values": _texts([value]), "default": _shown_default(key, known)})
    return rows


def _shown_default(key: str, known: dict[str, Any]) -> str | None:
    default = default_of(key, known)
    return None if default == NOT_THERE else shown(default)


def shown(value: Any) -> str:
    """A value as a recipe spells it."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _section(key: str) -> int:
    sections = list(Recipe.model_fields)
    section = key.split(".")[0]
    return sections.index(section) if section in sections else len(sections)


def _texts(values: Sequence[Any]) -> list[str]:
    """Absolute paths by their names alone, as long as those differ."""
    texts = [shown(value) for value in values]
    short = [PurePosixPath(text).name if text.startswith("/") else text for text in texts]
    return short if len(set(short)) == len(set(texts)) else texts


def sources(environments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the runs were made from, by content. Keys of each: what, same (None where a run does not say).

    Args:
        environments: environment.json of each run.
    """
    rows = []
    for key, what in _MADE_FROM.items():
        found = []
        for environment in environments:
            made_from = environment.get("made_from")
            found.append(made_from.get(key) if isinstance(made_from, dict) else None)
        same = None if None in found else len({json.dumps(_content(value), sort_keys=True) for value in found}) == 1
        rows.append({"what": what, "same": same})
    return rows


def not_comparable(rows: Sequence[dict[str, Any]], differing: Sequence[dict[str, Any]]) -> list[str]:
    """The results (keys of `mtr.report.results.ROWS`) that are of other tokens or other conversations in some run.

    Args:
        rows: as `sources` returns them.
        differing: as `differences` returns them.
    """
    others = {row["what"] for row in rows if row["same"] is False}
    keys = [row["key"] for row in differing]
    tokens = bool(others & {"chat template", "tokenizer"}) or any(map(_OF_TOKENS.match, keys))
    found = ["loss", "loss_recent"] if tokens or "training data" in others else []
    found += ["eval_loss", "best_eval_loss"] if tokens or "evaluation data" in others else []
    played = "evaluation data" in others or any(map(_OF_PLAYED.match, keys))
    return found + (["right_before", "right_after"] if played else [])


def _content(value: Any) -> Any:
    """Without what may differ between copies of the same content."""
    if isinstance(value, dict):
        return {key: _content(item) for key, item in value.items() if key not in ("name", "modified", "bytes")}
    return [_content(item) for item in value] if isinstance(value, list) else value

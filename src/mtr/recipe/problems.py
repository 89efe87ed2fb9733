"""Explains pydantic's validation errors in one line: each wrong key, and the known key nearest to an unknown one."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from mtr.console import first_few, shorten
from mtr.recipe.sections import Recipe

_MOST_PROBLEMS = 10
_MOST_SHOWN = 80
"""Characters of a key or a value."""


def explain(error: ValidationError) -> str:
    """One line with everything that is wrong with a recipe, as far as a line can hold it."""
    parts: list[str] = []
    seen: set[str] = set()
    problems = error.errors(include_url=False)
    of_booleans = {problem["loc"][:-1] for problem in problems if _is_of_booleans(problem)}
    for problem in sorted(problems, key=_is_of_booleans):  # words tell more than truth values
        keys = _keys_only([shorten(str(part), _MOST_SHOWN) for part in problem["loc"]])
        where = ".".join(keys) or "recipe"
        if problem["type"] != "extra_forbidden" and where in seen:
            continue  # another branch of the same union
        seen.add(where)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(keys[:-1])
            near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            parts.append(f"unknown key {where!r}, {hint}")
        elif problem["type"] == "missing":
            parts.append(f"{where!r} is missing")
        else:
            message = shorten(problem["msg"].removeprefix("Value error, "), 300)
            if problem["type"] == "literal_error" and problem["loc"][:-1] in of_booleans:
                message += ", true or false"
            if problem["type"] in ("model_type", "model_attributes_type"):
                message = "a section must be a mapping of keys"
            parts.append(f"{where!r}: {message}{_shown(problem.get('input'))}")
    return first_few(list(dict.fromkeys(parts)), _MOST_PROBLEMS)


def _is_of_booleans(problem: Any) -> bool:
    """The branch of a union, as in `bool | Literal["auto"]`, whose location ends with the branch's name."""
    return bool(problem["loc"]) and problem["loc"][-1] == "bool"


def _shown(given: Any) -> str:
    """` (got ...)` for a value that fits on a line."""
    if isinstance(given, str):
        given = shorten(given, _MOST_SHOWN)
    return f" (got {given!r})" if isinstance(given, (str, int, float, bool, type(None))) else ""


def _keys_only(location: list[str]) -> list[str]:
    """A location without the names of union branches, which are not keys of the recipe."""
    section: type[BaseModel] | None = Recipe
    keys = []
    for part in location:
        if part.isdigit():
            keys.append(part)
        elif section is None:
            break
        else:
            keys.append(part)
            field = section.model_fields.get(part)
            section = _section_in(field.annotation) if field else None
    return keys


def _known_keys(keys: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for key in keys:
        if key.isdigit():
            continue
        section = _section_in(section.model_fields[key].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.GenericAlias) or typing.get_origin(annotation) is not None:
        annotations = typing.get_args(annotation)
    else:
        annotations = getattr(annotation, "__args__", ())
    return next((found for a in annotations if (found := _section_in(a))), None)

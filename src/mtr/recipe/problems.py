"""Explains pydantic's validation errors in one line: each wrong key, and the known key nearest to an unknown one."""

from __future__ import annotations

import difflib
import sys
import types
import typing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from mtr.console import first_few, shorten
from mtr.recipe.foreign_keys import what_to_use
from mtr.recipe.places import OVERRIDE, Place, Places, at, leading_keys
from mtr.recipe.sections import Recipe

_MOST_PROBLEMS = 10
_MOST_SHOWN = 80
"""Characters of a key or a value."""


@dataclass(frozen=True)
class _Problem:
    keys: list[str]
    """Empty: of the recipe as a whole."""
    text: str
    of_value: bool = False
    """The key is right, and its value is not."""

    def place(self, places: Places) -> Place | None:
        keys = self.keys or leading_keys(self.text)
        if not places.names(keys):
            keys = []
        return places.of_value(keys) if self.of_value else places.of_key(keys)


def explain(error: ValidationError) -> str:
    """One line with everything that is wrong with a recipe, as far as a line can hold it."""
    return first_few([problem.text for problem in _problems(error)], _MOST_PROBLEMS)


def explain_in(name: str, error: ValidationError, places: Places) -> str:
    """As `explain`, with the name of the file, and where each problem is in it, in the order of the file."""
    found = [(problem.place(places), problem.text) for problem in _problems(error)]
    found.sort(key=lambda one: (one[0].line, one[0].column) if one[0] else (sys.maxsize, 0))
    first, *others = found
    texts = [f"{at(name, first[0])}: {first[1]}", *(f"{place or OVERRIDE}: {text}" for place, text in others)]
    return first_few(texts, _MOST_PROBLEMS)


def _problems(error: ValidationError) -> list[_Problem]:
    found: dict[str, _Problem] = {}
    seen: set[str] = set()
    problems = error.errors(include_url=False)
    of_booleans = {problem["loc"][:-1] for problem in problems if _is_of_booleans(problem)}
    for problem in sorted(problems, key=_is_of_booleans):  # words tell more than truth values
        keys = _keys_only([str(part) for part in problem["loc"]])
        where = ".".join(shorten(key, _MOST_SHOWN) for key in keys)
        if problem["type"] != "extra_forbidden" and where in seen:
            continue  # another branch of the same union
        seen.add(where)
        if problem["type"] == "extra_forbidden":
            one = _Problem(keys, f"unknown key {where!r}{_hint(keys)}")
        elif problem["type"] == "missing":
            one = _Problem(keys, f"{where!r} is missing")
        else:
            message = _message(problem, problem["loc"][:-1] in of_booleans)
            one = _Problem(keys, f"{where!r}: {message}" if keys else message, of_value=True)
        found.setdefault(one.text, one)
    return list(found.values())


def _hint(keys: list[str]) -> str:
    """What to write in place of an unknown key: what another trainer's is called here, or the nearest known key."""
    if use := what_to_use(keys[-1]):
        return f": {use}"
    known = _known_keys(keys[:-1])
    near = difflib.get_close_matches(shorten(keys[-1], _MOST_SHOWN), known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else f", known keys: {', '.join(known)}"


def _message(problem: Any, or_boolean: bool) -> str:
    """What is wrong with a value, and the value where it is short."""
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"a section must be a mapping of keys{_shown(problem.get('input'))}"
    message = shorten(problem["msg"].removeprefix("Value error, "), 300)
    if problem["type"] == "literal_error" and or_boolean:
        message += ", true or false"
    return message + _shown(problem.get("input"))


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

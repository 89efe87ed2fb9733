"""Explains pydantic's validation errors in one line: each wrong key, and the known key nearest to an unknown one."""

from __future__ import annotations

import difflib
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mtr.console import first_few, shorten
from mtr.recipe.descriptions import every_key
from mtr.recipe.foreign_keys import what_to_use
from mtr.recipe.places import OVERRIDE, Place, Places, at, leading_keys
from mtr.recipe.sections import LoraSection, Recipe

_MOST_PROBLEMS = 10
_MOST_SHOWN = 80
"""Characters of a key or a value."""
_NEAR = 0.6
"""How alike a key and its misspelling are at least, from 0 to 1; below it, names are alike by chance."""
_NO_SECTION = ("model_type", "model_attributes_type")


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
    """Each once: what the branches of a union say of the same value is one problem."""
    branches: dict[tuple[str, ...], list[Any]] = {}
    for problem in error.errors(include_url=False):
        branches.setdefault(tuple(_keys_only(problem["loc"])), []).append(problem)
    found: dict[str, _Problem] = {}
    for keys, problems in branches.items():
        first, *others = sorted(problems, key=_is_of_booleans)  # words tell more than truth values
        one = _problem(list(keys), first, others)
        found.setdefault(one.text, one)
    return list(found.values())


def _problem(keys: list[str], problem: Any, others: Iterable[Any]) -> _Problem:
    where = ".".join(shorten(key, _MOST_SHOWN) for key in keys)
    if problem["type"] == "extra_forbidden":
        return _Problem(keys, f"unknown key {where!r}{_hint(keys)}")
    if problem["type"] == "missing":
        return _Problem(keys, f"{where!r} is missing")
    said = shorten(problem["msg"].removeprefix("Value error, "), 300)
    named = leading_keys(said)
    if keys and named[: len(keys)] == keys:  # of a section: `training.optim: muon works with ...`
        return _Problem(named, said, of_value=True)
    if keys and named[:1] == keys[-1:]:  # of a key: `lr_scheduler_kwargs.min_lr: must be a number`
        return _Problem([*keys[:-1], *named], ".".join([*keys[:-1], said]), of_value=True)
    field, section = _known(keys)
    if field and section and named and named[0] in section.model_fields:  # `max_tokens (10) is below ...`
        return _Problem([*keys, *named], f"{where}.{said}", of_value=True)
    if problem["type"] in _NO_SECTION:
        said = "a section must be a mapping of keys"
    said += _alternatives(others) + _shown(problem) + _mend(problem, field, section)
    return _Problem(keys, f"{where!r}: {said}" if keys else said, of_value=True)


def _hint(keys: list[str]) -> str:
    """What to write in place of an unknown key: what another trainer's is called here, where a key of this name is, or
    the nearest known key.
    """
    if use := what_to_use(keys[-1]):
        return f": {use}"
    section, dot, last = keys[-1].rpartition(".")
    if dot and _elsewhere().get(last) == keys[-1]:
        return f", write '{last}:' below '{section}:'"
    if elsewhere := _elsewhere().get(keys[-1]):
        return f": it is {elsewhere}"
    known = list((_known(keys[:-1])[1] or Recipe).model_fields)
    near = difflib.get_close_matches(shorten(keys[-1], _MOST_SHOWN), known, n=1, cutoff=_NEAR)
    return f", did you mean {near[0]!r}?" if near else f", known keys: {', '.join(known)}"


@cache
def _elsewhere() -> dict[str, str]:
    """Where keys are, by their names alone."""
    found = {key.name.rpartition(".")[2]: key.name for key in every_key()}
    return found | {name: f"{name}, beside model, data and training" for name in Recipe.model_fields}


def _alternatives(others: Iterable[Any]) -> str:
    """What else a value may be, by the other branches of a union."""
    found = ""
    for other in others:
        if other["type"] == "literal_error":
            found += f", or {other['ctx']['expected'].replace('True', 'true')}"
        elif other["type"] == "list_type":
            found += ", or a list"
        elif _is_of_booleans(other):
            found += ", true or false"
    return found


def _is_of_booleans(problem: Any) -> bool:
    """The branch of a union, as in `bool | Literal["auto"]`, whose location ends with the branch's name."""
    return bool(problem["loc"]) and problem["loc"][-1] in ("bool", "literal[True]")


def _shown(problem: Any) -> str:
    """` (got ...)` for a value that fits on a line, as YAML spells it."""
    given = problem.get("input")
    if given is None or isinstance(given, bool):
        return f" (got {str(given).lower() if given is not None else 'null'})"
    if isinstance(given, str):
        given = shorten(given, _MOST_SHOWN)
    return f" (got {given!r})" if isinstance(given, (str, int, float)) else ""


def _mend(problem: Any, field: FieldInfo | None, section: type[BaseModel] | None) -> str:
    """What to do about a value of another type, where that is known."""
    given = problem.get("input")
    if problem["type"] in _NO_SECTION and section:
        return _mend_of_section(given, section)
    if given is None and field and not field.is_required():
        return "; leave the key out for its default"
    if problem["type"] == "string_type" and isinstance(given, (bool, int, float)):
        return "; text that YAML reads as a number, true or false needs quotes"
    return ""


def _mend_of_section(given: Any, section: type[BaseModel]) -> str:
    fields = section.model_fields
    first = next(iter(fields))
    if section is LoraSection and (given is False or given in ("none", "false", "off", "no")):
        return "; null trains all weights"
    if isinstance(given, str) and (joined := re.match(r"(\w+)\s*[:=：]\s*(.*)", given)) and joined[1] in fields:
        return f", did you mean '{joined[1]}: {shorten(joined[2], _MOST_SHOWN)}'?"
    if isinstance(given, str) and fields[first].is_required():
        return f", did you mean '{first}: {shorten(given, _MOST_SHOWN)}' below it?"
    return ""


def _keys_only(location: Sequence[str | int]) -> list[str]:
    """A location without the names of union branches, which are not keys of the recipe."""
    section: type[BaseModel] | None = Recipe
    is_mapping = False
    """What is next is a key of a mapping that is no section."""
    keys = []
    for part in map(str, location):
        if section is None and not is_mapping and not part.isdigit():
            break
        keys.append(part)
        if section is None or not part.isdigit():
            field = section.model_fields.get(part) if section else None
            section = _section_in(field.annotation) if field else None
            is_mapping = field is not None and section is None and _is_mapping(field.annotation)
    return keys


def _known(keys: Sequence[str]) -> tuple[FieldInfo | None, type[BaseModel] | None]:
    """The field of a key, and the section that it is or has items of."""
    field: FieldInfo | None = None
    section: type[BaseModel] | None = Recipe
    for key in keys:
        if section is None:
            return None, None  # below a plain value
        if not key.isdigit():
            field = section.model_fields.get(key)
            section = _section_in(field.annotation) if field else None
    return field, section


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.GenericAlias) or typing.get_origin(annotation) is not None:
        annotations = typing.get_args(annotation)
    else:
        annotations = getattr(annotation, "__args__", ())
    return next((found for a in annotations if (found := _section_in(a))), None)

"""The keys of a recipe, what they mean (the text under each field of its sections), and what they may be."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mtr.recipe.sections import Recipe


@dataclass(frozen=True)
class Key:
    name: str
    """With its sections: `training.seed`."""
    text: str
    """What it means; empty where the name says it."""
    field: FieldInfo

    @property
    def choices(self) -> list[str]:
        """Its values as a recipe spells them, where there are few."""
        return list(dict.fromkeys(_choices(self.field.annotation)))


def every_key(section: type[BaseModel] = Recipe, inside: str = "") -> Iterator[Key]:
    """The keys of all sections in their order; a list of sections, such as data.train, is one key."""
    texts = descriptions(section)
    for name, field in section.model_fields.items():
        if below := _section_of(field.annotation):
            yield from every_key(below, f"{inside}{name}.")
        else:
            yield Key(f"{inside}{name}", texts.get(name, ""), field)


@cache
def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """The text under each field of a section, on one line, by the field's name; fields without one are left out."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            found[field.target.id] = " ".join(below.value.value.split())
    return found


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """A section, or one that may be null."""
    parts = [part for part in _parts(annotation) if part is not type(None)]
    only = parts[0] if len(parts) == 1 else None
    return only if isinstance(only, type) and issubclass(only, BaseModel) else None


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(part for one in typing.get_args(annotation) for part in _parts(one))
    return (annotation,)


def _choices(annotation: Any) -> Iterator[str]:
    for part in _parts(annotation):
        if typing.get_origin(part) is Literal:
            yield from (str(value).lower() if isinstance(value, bool) else value for value in typing.get_args(part))
        elif part is bool:
            yield from ("true", "false")
        elif part is type(None):
            yield "null"
        elif typing.get_origin(part) is list:
            yield from _choices(typing.get_args(part)[0])

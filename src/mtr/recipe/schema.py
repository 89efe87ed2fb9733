"""The JSON schema of a recipe, for editors: completion, descriptions, and mistakes underlined as they are typed.

    # yaml-language-server: $schema=path/to/schema.json

It is made from the sections. It knows their short forms (`data.train: file.jsonl`), but not what ties keys to each
other (max_tokens is at least max_length), nor which files exist: `mtr` checks those. Values are those of YAML 1.2, so
numbers in quotes and `yes` for true, which a recipe may hold, are mistakes to the schema.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from mtr.recipe.descriptions import descriptions
from mtr.recipe.sections import (
    PERCENT,
    DataSection,
    LoraSection,
    ModelSection,
    Recipe,
    Source,
    ThinkingSection,
    TrainingSection,
)
from mtr.recipe.values import RESERVED_ARGUMENTS

SCHEMA_FILE = Path(__file__).with_name("schema.json")
"""The output of `mtr schema`; the modeline of a recipe names it."""
_NOT_BLANK: JsonSchemaValue = {"pattern": "\\S"}
_TEXT: JsonSchemaValue = {"type": "string", **_NOT_BLANK}
_SIGNALS = (
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "IOT", "BUS", "FPE", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CLD", "CONT", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "POLL", "PWR", "SYS", "RTMIN", "RTMAX", "EMT", "INFO",
)  # fmt: skip
"""Those that a process can catch, on Linux or macOS."""


_NAMES: tuple[tuple[type[BaseModel], str], ...] = (
    (ModelSection, "name_or_path"),
    (LoraSection, "init_from"),
    (ThinkingSection, "open"),
    (ThinkingSection, "close"),
    (Source, "path"),
    (TrainingSection, "output_dir"),
)
"""Texts that are not blank."""


class _Generator(GenerateJsonSchema):
    """Without titles, which repeat the names of keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        del schema
        return False


def recipe_schema() -> dict[str, Any]:
    """The JSON schema, draft 2020-12."""
    schema = Recipe.model_json_schema(schema_generator=_Generator)
    sections = schema["$defs"]
    every: list[type[BaseModel]] = [Recipe, *_sections(Recipe)]
    for section in every:
        described = schema if section is Recipe else sections[section.__name__]
        described.pop("title", None)
        for name, text in descriptions(section).items():
            described["properties"][name]["description"] = text
        for entry in described["properties"].values():
            if isinstance(entry.get("default"), dict):
                del entry["default"]  # a section is made of its own defaults
    _add_short_forms(schema["properties"], sections)
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": "urn:mtr:recipe",
        "title": "A recipe of mtr",
        "description": "What to train, on which data, and how. Paths are relative to the recipe or the working folder.",
    }
    return {**head, **{key: value for key, value in schema.items() if key not in head}}


def schema_text() -> str:
    """The schema as its file holds it, without the last line break."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False)


def _sections(section: type[BaseModel]) -> list[type[BaseModel]]:
    """All sections below one, each once."""
    found: dict[type[BaseModel], None] = {}
    for field in section.model_fields.values():
        for part in _types(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= {part: None, **dict.fromkeys(_sections(part))}
    return list(found)


def _types(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", ())
    return [found for one in arguments for found in _types(one)] if arguments else [annotation]


def _add_short_forms(recipe: JsonSchemaValue, sections: JsonSchemaValue) -> None:
    """What the validators before pydantic's own take, and what those after it refuse."""
    source = {"anyOf": [_TEXT, {"$ref": f"#/$defs/{Source.__name__}"}]}
    sources = {"anyOf": [*source["anyOf"], {"type": "array", "items": source}]}
    data, training = (sections[one.__name__]["properties"] for one in (DataSection, TrainingSection))
    share = next(one for one in data["eval_fraction"]["anyOf"] if one.get("type") == "number")
    _replace(data, "train", {"anyOf": [*sources["anyOf"][:2], {"type": "array", "items": source, "minItems": 1}]})
    no_percent = {**_TEXT, "not": {"pattern": f"^{PERCENT}$"}}
    _replace(data, "eval", {"anyOf": [no_percent, *sources["anyOf"][1:], share]})
    tracker = training["report_to"]["items"]
    none = [{"const": "none"}, {"const": ["none"]}, {"type": "null"}]
    _replace(training, "report_to", {"anyOf": [tracker, {"type": "array", "items": tracker}, *none]})
    signal = _signal()
    for name in ("preempt_signal", "checkpoint_signal"):
        _replace(training, name, {"anyOf": [signal, {"type": "array", "items": signal}, {"type": "null"}]})
    training["lr_scheduler_type"]["enum"].append("wsd")
    recipe["template"]["propertyNames"] = {"not": {"enum": sorted(RESERVED_ARGUMENTS)}}
    _text(recipe["date"]).update({"format": "date", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"})
    _text(training["push_to_hub"]).update({"pattern": "^([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]{1,96}$"})
    for section, name in _NAMES:
        _text(sections[section.__name__]["properties"][name]).update(_NOT_BLANK)


def _text(entry: JsonSchemaValue) -> JsonSchemaValue:
    """What an entry says of texts, to be added to."""
    return next(one for one in (entry, *entry.get("anyOf", ())) if one.get("type") == "string")


def _signal() -> JsonSchemaValue:
    """The name of a signal, in capitals or not, with or without SIG."""

    def spelled(name: str) -> str:
        return "".join(f"[{letter}{letter.lower()}]" if letter.isalpha() else letter for letter in name)

    names = "|".join(spelled(name) for name in _SIGNALS)
    return {
        "type": "string",
        "pattern": f"^({spelled('SIG')})?({names})$",
        "examples": ["SIGUSR1", "SIGUSR2", "SIGHUP"],
    }


def _replace(properties: JsonSchemaValue, name: str, types: JsonSchemaValue) -> None:
    kept = {key: value for key, value in properties[name].items() if key in ("description", "default")}
    properties[name] = {**kept, **types}


def modeline(recipe: Path | None) -> str:
    """The first line of a recipe, by which editors with a YAML language server find the schema.

    Args:
        recipe: where it will be; None: nowhere in particular. In the source tree of mtr, the schema is named relative
            to it, as recipes there move with the tree.
    """
    tree = SCHEMA_FILE.parents[3]
    where = str(SCHEMA_FILE)
    if recipe is not None and tree in recipe.absolute().parents and (tree / "pyproject.toml").exists():
        where = os.path.relpath(SCHEMA_FILE, recipe.absolute().parent)
    return f"# yaml-language-server: $schema={where}"

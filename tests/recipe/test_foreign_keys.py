"""Claims: keys of other tools are known by name, none of them is a key of a recipe, and what to use instead exists."""

from __future__ import annotations

import re

import pytest

from mtr.recipe import foreign_keys
from mtr.recipe.foreign_keys import what_to_use
from mtr.recipe.sections import Recipe

SECTIONS = {name: field.annotation for name, field in Recipe.model_fields.items()}
FIELDS = {
    f"{section}.{key}"
    for section, annotation in SECTIONS.items()
    for kind in (annotation, *getattr(annotation, "__args__", ()))
    for key in getattr(kind, "model_fields", {})
}


def test_noise_is_refused_with_its_reason() -> None:
    assert "one pass would no longer be the passes per turn" in str(what_to_use("neftune_noise_alpha"))
    assert what_to_use("no_such_key") is None


@pytest.mark.parametrize("key", foreign_keys._REPLACEMENTS)
def test_each_replacement_exists(key: str) -> None:
    text = foreign_keys._REPLACEMENTS[key]
    named = re.findall(r"\b(?:model|lora|data|sequence|loss|generation|training)\.[a-z_0-9]+", text)
    assert set(named) <= FIELDS, "names a key that no recipe has"
    assert key not in Recipe.model_fields
    assert text[0].islower(), "it goes after a colon"
    assert not text.endswith(".")


def test_a_key_of_a_section_is_never_called_foreign() -> None:
    own = {name.partition(".")[2] for name in FIELDS}
    both = own & set(foreign_keys._REPLACEMENTS)
    assert both == set(), "it could be meant for another section"

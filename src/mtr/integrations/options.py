"""Options of the public API, checked as those of a recipe, whose names and limits they have."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from mtr.errors import UserError
from mtr.recipe.problems import explain
from mtr.recipe.sections import Recipe


def recipe_of(who: str, **sections: Any) -> Recipe:
    """A recipe without data and without a run.

    Args:
        who: was given the options, for messages.

    Raises:
        UserError: an option is wrong.
    """
    raw = {**sections, "data": {"train": "none", **sections.get("data", {})}, "training": {"output_dir": "none"}}
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{who}: {explain(error)}") from None

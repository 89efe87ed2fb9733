"""Loads the tokenizer of a recipe's model, and makes the renderer of its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date as Date
from typing import Any

from mtr.chat.findings import Tags
from mtr.chat.rendering import Renderer
from mtr.chat.stop_ids import known, load_stop_ids
from mtr.chat.template import Template
from mtr.chat.trials import find
from mtr.console import printable
from mtr.errors import UserError, described, is_failure
from mtr.recipe.model_config import check_config_file
from mtr.recipe.paths import check_model_folder
from mtr.recipe.processor import processor_template
from mtr.recipe.sections import Recipe


def load_tokenizer(recipe: Recipe) -> Any:
    """
    Raises:
        UserError: the model is not found, or has no tokenizer.
    """
    from transformers import AutoTokenizer

    name = check_model_folder(recipe.model.name_or_path)
    check_config_file(recipe.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
        if not tokenizer.chat_template:
            tokenizer.chat_template = processor_template(name, recipe.model.revision)
        return tokenizer
    except BaseException as error:
        if not is_failure(error):
            raise
        problem = printable(described(error))
        raise UserError(f"model.name_or_path: no tokenizer can be loaded from {name}: {problem}") from None


def make_renderer(
    tokenizer: Any,
    template: dict[str, Any] | None = None,
    thinking: Tags | None = None,
    date: str | None = None,
    stop_ids: Sequence[int] = (),
    **options: Any,
) -> Renderer:
    """The renderer of a tokenizer's chat template, after finding out what the template does.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        template: arguments for the chat template.
        thinking: the tags around thinking; if not given, they are found with the template or the added tokens.
        date: YYYY-MM-DD, for templates that print one; today if not given.
        stop_ids: what the generation config stops at, best first.
        options: of Renderer: history, train_on, rendering.

    Raises:
        UserError: the tokenizer has no chat template, or it fails on a single user message, or takes too much time or
            memory; the tokenizer has none of the stop ids.
    """
    made = Template(tokenizer, template, Date.fromisoformat(date) if date else None)
    stops = known(tokenizer, stop_ids)
    return Renderer(made, find(made, stops, thinking), stops, **options)


def load_renderer(recipe: Recipe, tokenizer: Any) -> Renderer:
    """
    Raises:
        UserError: as `make_renderer`.
    """
    tags = (recipe.thinking.open, recipe.thinking.close)
    return make_renderer(
        tokenizer,
        recipe.template,
        thinking=(tags[0], tags[1]) if tags[0] and tags[1] else None,
        date=recipe.date,
        stop_ids=load_stop_ids(recipe.model),
        history=recipe.thinking.history,
        train_on=recipe.train_on,
        rendering=recipe.data.rendering,
    )

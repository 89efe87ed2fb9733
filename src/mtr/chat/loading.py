"""Loads the tokenizer of a recipe's model, and makes the renderer of its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date as Date
from typing import Any

from mtr.chat.findings import Tags
from mtr.chat.rendering import Renderer
from mtr.chat.template import Template
from mtr.chat.trials import find
from mtr.errors import UserError, one_line
from mtr.recipe.paths import check_model_folder
from mtr.recipe.sections import ModelSection, Recipe


def load_tokenizer(recipe: Recipe) -> Any:
    """
    Raises:
        UserError: the model is not found, or has no tokenizer.
    """
    from transformers import AutoTokenizer

    name = check_model_folder(recipe.model.name_or_path)
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise UserError(f"model.name_or_path: no tokenizer can be loaded from {name}: {one_line(error)}") from None


def load_stop_ids(section: ModelSection) -> list[int]:
    """What generation stops at, best first: eos_token_id of the generation config, else of the config."""
    from transformers import GenerationConfig, PretrainedConfig

    name, revision = section.name_or_path, section.revision
    try:
        eos = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except (OSError, ValueError):
        try:
            config = PretrainedConfig.get_config_dict(name, revision=revision)[0]
        except (OSError, ValueError):
            return []
        eos = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    return list(eos) if isinstance(eos, list) else [eos] if eos is not None else []


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
        UserError: the tokenizer has no chat template, or it fails on a single user message.
    """
    made = Template(tokenizer, template, Date.fromisoformat(date) if date else None)
    return Renderer(made, find(made, stop_ids, thinking), stop_ids, **options)


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

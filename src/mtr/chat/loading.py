"""Tokenizer and renderer, as the recipe asks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtr.chat.rendering import Renderer
from mtr.errors import UserError, one_line
from mtr.recipe.sections import ModelSection, Recipe


def load_tokenizer(recipe: Recipe) -> Any:
    """
    Raises:
        UserError: nothing there, or it holds no tokenizer.
    """
    from transformers import AutoTokenizer

    name = check_model_folder(recipe.model.name_or_path)
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise UserError(f"model.name_or_path: no tokenizer can be loaded from {name}: {one_line(error)}") from None


def load_renderer(recipe: Recipe, tokenizer: Any) -> Renderer:
    tags = (recipe.thinking.open, recipe.thinking.close)
    return Renderer(
        tokenizer,
        recipe.template,
        thinking=(tags[0], tags[1]) if tags[0] and tags[1] else None,
        date=recipe.date,
        stop_ids=_stop_ids(recipe.model),
        history=recipe.thinking.history,
        train_on=recipe.train_on,
        rendering=recipe.data.rendering,
    )


def check_model_folder(name: str) -> str:
    """Refuse what is plainly a path and not there, before it is asked for on the Hub."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name
    if looks_local and not Path(name).is_dir() and ("/" in name or name.startswith(".")):
        raise UserError(f"model.name_or_path: no such model folder: {name}")
    return name


def _stop_ids(section: ModelSection) -> list[int]:
    """What generation stops at, the first one first: the generation config's, or where there is none the config's."""
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

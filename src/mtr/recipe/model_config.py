"""A model's config.json, as the class of its model reads it, and what that class must not see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mtr.errors import UserError, described
from mtr.recipe.sections import ModelSection

_MOST_LAYERS = 10_000
"""The deepest language models have hundreds. Config classes build lists of this length before they check anything."""


def read_config(section: ModelSection) -> Any:
    """The config of a recipe's model, with the code of its repository if the recipe trusts it.

    Raises:
        UserError: the class of the model does not take it.
        OSError, ValueError: there is none that can be read, or it is of a kind that transformers does not know.
    """
    from transformers import AutoConfig, PretrainedConfig

    name, revision = section.name_or_path, section.revision
    try:
        _check_layers(PretrainedConfig.get_config_dict(name, revision=revision)[0])
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=section.trust_remote_code)
    except _TooManyLayersError as error:
        raise UserError(f"model.name_or_path: {name}: config.json cannot be used: {error}") from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever a library raises on a file that it did not expect
        raise UserError(f"model.name_or_path: {name}: config.json cannot be used: {_reason(error)}") from None


def check_config_file(section: ModelSection) -> None:
    """Before a tokenizer is loaded, which may need no config, or less of it.

    Raises:
        UserError: there is one, and the class of the model does not take it.
    """
    try:
        read_config(section)
    except UserError:
        raise
    except (OSError, ValueError):
        return


class _TooManyLayersError(Exception):
    """Says which key."""


def _check_layers(raw: Any) -> None:
    for key, value in _integers(raw):
        if "layer" in key and value > _MOST_LAYERS:
            raise _TooManyLayersError(f"{key} is above {_MOST_LAYERS:,}, and no model has as many layers")


def _integers(raw: Any) -> Iterator[tuple[str, int]]:
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            if isinstance(value, int):
                yield str(key), value
            yield from _integers(value)


def _reason(error: Exception) -> str:
    """Of transformers' checks of a config only the reason, not the check."""
    return described(error.__cause__ if type(error).__name__.startswith("Strict") and error.__cause__ else error)

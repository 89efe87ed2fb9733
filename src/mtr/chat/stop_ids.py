"""What generation stops at, as the model's files say."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtr.console import first_few, labelled, shorten
from mtr.errors import UserError, described
from mtr.recipe.sections import ModelSection

log = logging.getLogger("mtr")

_FILES = ("generation_config.json", "config.json")
_LARGEST = 2**31
"""Ids are below this in every vocabulary."""


def load_stop_ids(section: ModelSection) -> list[int]:
    """The model's eos_token_id, best first: of the generation config; of the config where there is none.

    Raises:
        UserError: a file cannot be read, or its eos_token_id is neither an id nor a list of ids.
    """
    for name in _FILES:
        held = _held(section, name)
        if held is not None:
            text = held.get("text_config") if name == "config.json" else None
            eos = held.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
            return _ids(eos, f"{section.name_or_path}: {name}")
    return []


def known(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Those ids that the tokenizer has a token for. The others, which can end no text, are logged.

    Raises:
        UserError: it has none of them.
    """
    found = [id_ for id_ in ids if tokenizer.convert_ids_to_tokens(id_) is not None]
    unknown = first_few([str(id_) for id_ in ids if id_ not in found])
    if ids and not found:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no token with the model's eos_token_id ({unknown}); "
            "the tokenizer is another model's, or eos_token_id in generation_config.json is wrong"
        )
    if unknown:
        log.info(labelled("note", f"eos_token_id: the tokenizer has no token {unknown}; it is left out"))
    return found


def _held(section: ModelSection, name: str) -> dict[str, Any] | None:
    """What a JSON file of the model holds; None if there is no such file."""
    from transformers.utils import cached_file

    try:
        path = cached_file(section.name_or_path, name, revision=section.revision)
    except OSError:
        return None
    if path is None:  # what transformers says of a local config.json that is not there
        return None
    where = f"model.name_or_path: {section.name_or_path}: {name}"
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {described(error)}; use that of the original model") from None
    if not isinstance(held, dict):
        raise UserError(f"{where} is no JSON object; use that of the original model")
    return held


def _ids(eos: Any, where: str) -> list[int]:
    if eos is None:
        return []
    ids = eos if isinstance(eos, list) else [eos]
    if all(type(id_) is int and 0 <= id_ < _LARGEST for id_ in ids):
        return ids
    raise UserError(
        f"model.name_or_path: {where}: eos_token_id is {shorten(json.dumps(eos), 80)}, "
        "and has to be the id of a token, or a list of ids"
    )

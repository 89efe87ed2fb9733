"""A base model and an adapter of it, loaded as PEFT puts them together; what does not fit is refused with names."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from mtr.errors import UserError, described
from mtr.model.lora import adapter_misfit, check_kept, read_adapter
from mtr.model.pretrained import Allowed, load_pretrained
from mtr.model.quantization import unquantised
from mtr.recipe.hub import Named, find
from mtr.recipe.sections import ModelSection


def load_weights(
    named: Named, problem: str, section: ModelSection | None, kept: Collection[str] = (), **options: Any
) -> tuple[Any, Any]:
    """A model, and its config as stored.

    Args:
        named: the model, and what names it.
        problem: begins the message of an error, before the model's name.
        section: of the recipe that it was trained with, if there is one: its code and gaps are trusted as there.
        kept: modules that an adapter holds whole, which the weights may lack.
        options: of `from_pretrained`: dtype, and where the weights go.

    Raises:
        UserError: it cannot be loaded, or its weights are not the model's.
    """
    from transformers import AutoConfig

    find([named])
    trust = bool(section and section.trust_remote_code)
    allowed = Allowed(tuple(section.allow_missing), tuple(section.allow_unexpected)) if section else Allowed()
    try:
        stored = AutoConfig.from_pretrained(named.name, revision=named.revision, trust_remote_code=trust)
    except Exception as error:  # whatever a library raises on a file that it did not expect
        raise UserError(f"{problem} {named.name}: {described(error)}") from None
    options = {"trust_remote_code": trust, **unquantised(stored), **options}
    try:
        model, fresh = load_pretrained(named.name, named.revision, stored, allowed, **options)
    except UserError as error:
        raise UserError(f"{problem} {error}") from None
    check_kept(fresh, kept)
    return model, stored


def read_adapter_config(file: Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA adapter on a named base model.

    Raises:
        UserError: it is another's.
    """
    if not file.is_file():  # reading a pipe may never end
        raise UserError(f"{file}: not a file; restore the config of the adapter")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not the config of an adapter: {described(error)}") from None
    if kind != "LORA":
        raise UserError(f"{file}: only LoRA adapters can be loaded and merged, this one is {str(kind)[:40]}")
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: base_model_name_or_path is {base!r}; name the base model's folder or Hub id there")
    found: dict[str, Any] = config
    return found


def load_adapter(folder: Path, base: Any) -> Any:
    """On the base model, in eval mode; PEFT itself passes over tensors that are missing or belong nowhere.

    Raises:
        UserError: there is none, or it does not fit.
    """
    from peft import PeftModel

    try:
        config, weights = read_adapter(folder)
        _check_ranks(config, weights)
        adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    except UserError as error:
        raise UserError(f"{folder}: the adapter cannot be loaded: it {error}") from None
    except Exception as error:  # whatever a library raises on a file that it did not expect
        raise UserError(f"{folder}: the adapter cannot be loaded: {described(error)}") from None
    if misfit := adapter_misfit(adapted, weights):
        raise UserError(
            f"{folder}: the adapter is not that of its adapter_config.json: it {misfit}; take both from one checkpoint"
        )
    return adapted


def _check_ranks(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Before PEFT makes room for them.

    Raises:
        UserError: a rank is larger than any side of the adapter's tensors.
    """
    largest = max((side for tensor in weights.values() for side in tensor.shape), default=0)
    for rank in (config.get("r"), *(config.get("rank_pattern") or {}).values()):
        if not isinstance(rank, int) or rank > largest:
            raise UserError(f"has rank {rank!r} in adapter_config.json, and no tensor of that size")

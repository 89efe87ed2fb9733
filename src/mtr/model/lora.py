"""LoRA: an adapter added to a model, and an existing one that a run starts from."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from mtr.attention.model_parts import text_config
from mtr.errors import UserError, one_line
from mtr.recipe.sections import LoraSection

log = logging.getLogger("mtr")


def add_lora(model: Any, lora: LoraSection, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = [name for name, _ in model.named_modules()]
    for wanted in lora.modules_to_save or []:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            raise UserError(f"lora.modules_to_save: the model has no module {wanted!r}")
    if lora.modules_to_save and getattr(text_config(model.config), "tie_word_embeddings", False):
        log.warning(
            "the model ties embeddings and head: modules_to_save trains a separate copy of each module that it names"
        )
    for wanted in lora.target_parameters or []:
        if not any(name == wanted or name.endswith(f".{wanted}") for name, _ in model.named_parameters()):
            raise UserError(f"lora.target_parameters: the model has no parameter {wanted!r}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        target_parameters=lora.target_parameters,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
    )
    try:
        with warnings.catch_warnings():  # PEFT's own patterns for fused experts, which all-linear leaves alone
            warnings.filterwarnings(
                "ignore", message=".*keys did not match any targeted module", category=RuntimeWarning
            )
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # said above
            adapted = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise UserError(f"lora: {one_line(error)}") from None
    if lora.init_from:
        _load_adapter(adapted, Path(lora.init_from))
    return adapted


def _load_adapter(model: Any, folder: Path) -> None:
    """Start from an existing adapter, which must belong to this base model and have the same shape.

    Raises:
        UserError: there is none, or it does not fit; the message names what differs.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    key = f"lora.init_from: {folder}"
    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(str(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{key} holds no adapter that can be read: {one_line(error)}") from None
    config = model.active_peft_config
    was, now = str(saved.get("base_model_name_or_path")), str(config.base_model_name_or_path)
    if Path(was).name != Path(now).name:
        raise UserError(f"{key} is an adapter of {was}, and model.name_or_path is {now}")
    names = {"r": "r", "lora_alpha": "alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    names |= {"rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    for name, ours in names.items():
        if saved.get(name) != getattr(config, name):
            raise UserError(f"{key} has {ours} {saved.get(name)}, the recipe says lora.{ours}: {getattr(config, name)}")
    wanted = get_peft_model_state_dict(model).keys()
    if strange := sorted(wanted ^ weights.keys()):
        what = "does not adapt" if strange[0] in wanted else "adapts more:"
        raise UserError(
            f"{key} {what} {strange[0]}; give lora.target_modules, target_parameters and modules_to_save as it has them"
        )
    set_peft_model_state_dict(model, weights)


def adapted_modules(model: Any) -> list[str]:
    """Names of the modules with LoRA, layer numbers replaced by `*`."""
    names = {
        ".".join("*" if part.isdigit() else part for part in name.split(".lora_")[0].split("."))
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    return sorted(name.removeprefix("base_model.model.") for name in names)

"""The model as the recipe asks for it: config checked, weights loaded, LoRA added."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import torch

from mtr.attention.choice import choose_backends
from mtr.attention.layers import refusal
from mtr.attention.model_parts import text_config
from mtr.errors import UserError, one_line
from mtr.model.lora import add_lora
from mtr.model.probe import check_exact
from mtr.model.quantization import four_bits, unquantised
from mtr.recipe.paths import check_model_folder
from mtr.recipe.sections import Recipe

log = logging.getLogger("mtr")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_config(recipe: Recipe) -> Any:
    """The model's config; a model that cannot be exact is refused here, before its weights are read.

    Raises:
        UserError: there is no config, or it rules exactness out.
    """
    from transformers import AutoConfig

    name = check_model_folder(recipe.model.name_or_path)
    try:
        config = AutoConfig.from_pretrained(
            name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise UserError(f"model.name_or_path: no model config at {name}: {one_line(error)}") from None
    reason = refusal(text_config(config), recipe.sequence.max_length)
    if reason:
        raise UserError(f"{name} ({config.model_type}) cannot be trained exactly: {reason}")
    return config


def compute_dtype(recipe: Recipe, config: Any, dtype: str | None = None) -> torch.dtype:
    """The dtype of the weights: the one asked for, or the checkpoint's."""
    asked = dtype or recipe.model.dtype
    stored = getattr(text_config(config), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    return DTYPES[asked] if asked != "auto" else stored


def load_model(
    recipe: Recipe,
    device: torch.device,
    dtype: str | None = None,
    quantise: bool = False,
    random_weights: bool = False,
) -> Any:
    """The causal LM with LoRA (or all weights trainable), on `device`, its own dropout switched off.

    Args:
        dtype: of DTYPES; overrides the recipe's.
        quantise: apply `model.load_in_4bit`; without it the weights are not quantized.
        random_weights: initialize from the config alone. To measure speed, not to train.

    Raises:
        UserError: the model cannot be loaded, would not be exact, or lacks modules that the recipe names.
    """
    config = load_config(recipe)
    choose_backends(recipe.model.attention, text_config(config), device, compute_dtype(recipe, config, dtype))
    quantisation = unquantised(config)
    if quantise and recipe.model.load_in_4bit:
        quantisation = four_bits(device)
    check_exact(config, trust_remote_code=recipe.model.trust_remote_code)
    asked = dtype or recipe.model.dtype
    for key in _dropout_keys(config):
        log.warning("%s of the model is set to 0; only lora.dropout is applied", key)
        setattr(text_config(config), key, 0.0)
    if random_weights:
        model = _random_model(recipe, config, asked, device)
    else:
        model = _pretrained_model(recipe, config, asked, device, quantisation)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora, recipe.training.seed)
    elif model.dtype == torch.float16:
        raise UserError("model.dtype: full fine-tuning in float16 is not supported; use bfloat16 or float32, or lora")
    return model


def _pretrained_model(
    recipe: Recipe, config: Any, dtype: str, device: torch.device, quantisation: dict[str, Any]
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            recipe.model.name_or_path,
            config=config,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            dtype="auto" if dtype == "auto" else DTYPES[dtype],
            use_safetensors=True,
            **quantisation,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(
            f"model.name_or_path: no weights can be loaded from {recipe.model.name_or_path}: {one_line(error)}"
        ) from None
    return model if getattr(model, "is_loaded_in_4bit", False) else model.to(device)


def _random_model(recipe: Recipe, config: Any, dtype: str, device: torch.device) -> Any:
    """Created on its device and in its dtype, so that there is never a second copy or one in float32."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    wanted = compute_dtype(recipe, config, dtype)
    torch.manual_seed(recipe.training.seed)
    with device:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code, dtype=wanted)


def _dropout_keys(config: Any) -> list[str]:
    """Config keys of dropout and other noise: turns would share it on their common history, so it is switched off."""
    keys = vars(text_config(config)).items()
    noisy = ("dropout", "pdrop", "jitter_noise")
    return [key for key, value in keys if key.endswith(noisy) and isinstance(value, float) and value > 0]

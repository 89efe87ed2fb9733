"""The model as the recipe asks for it: config checked, weights loaded, LoRA added."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch

from mtr.attention.choice import choose_backends
from mtr.attention.model_parts import freeze_idle, text_config
from mtr.errors import UserError, one_line
from mtr.model.adapter_start import make_up_for_quantization
from mtr.model.auto_class import auto_class
from mtr.model.config import check_config, check_size
from mtr.model.lora import add_lora, check_kept
from mtr.model.pretrained import Allowed, load_pretrained
from mtr.model.quantization import four_bits, unquantised
from mtr.model.weights import stored_tensors, weight_files
from mtr.recipe.model_config import read_config
from mtr.recipe.paths import check_model_folder
from mtr.recipe.sections import LoraSection, Recipe

log = logging.getLogger("mtr")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_config(recipe: Recipe, random_weights: bool = False) -> Any:
    """The model's config. One that does not fit its weights is refused here, before weights are read or memory is
    taken.

    Args:
        random_weights: there need not be any weight files.

    Raises:
        UserError: there is no config, or it contradicts itself or the weights.
    """
    model = recipe.model
    name = check_model_folder(model.name_or_path)
    if (Path(name) / "adapter_config.json").exists():
        raise UserError(
            f"model.name_or_path: {name} holds an adapter (adapter_config.json), which would be put on top of the "
            "model; name the base model and give the adapter as lora.init_from, or merge it first (mtr merge)"
        )
    try:
        config = read_config(model)
        check_config(text_config(config))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"model.name_or_path: no model config at {name}: {one_line(error)}") from None
    except ValueError as error:
        raise UserError(f"model.name_or_path: {name}: config.json cannot be used: {one_line(error)}") from None
    itemsize = compute_dtype(recipe, config).itemsize if random_weights else 0.5
    _check_files(recipe, config, random_weights, itemsize)
    return config


def _check_files(recipe: Recipe, config: Any, random_weights: bool, itemsize: float) -> None:
    model = recipe.model
    try:
        stored = {} if random_weights else stored_tensors(weight_files(model.name_or_path, model.revision))
    except UserError as error:
        raise UserError(f"model.name_or_path: no weights can be loaded from {error}") from None
    try:
        check_size(config, model.trust_remote_code, stored, itemsize, may_miss=bool(model.allow_missing))
    except UserError as error:
        raise UserError(f"model.name_or_path: {model.name_or_path}: config.json {error}") from None


def compute_dtype(recipe: Recipe, config: Any, dtype: str | None = None) -> torch.dtype:
    """The dtype of the weights: the one asked for, or the checkpoint's.

    Raises:
        UserError: the checkpoint's is none that can be trained.
    """
    asked = dtype or recipe.model.dtype
    if asked != "auto":
        return DTYPES[asked]
    stored = getattr(text_config(config), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    if stored not in DTYPES.values():
        raise UserError(f"{recipe.model.name_or_path}: config.json says dtype {stored}; set model.dtype")
    return stored


def load_model(
    recipe: Recipe,
    device: torch.device,
    dtype: str | None = None,
    quantise: bool = False,
    random_weights: bool = False,
    placement: torch.device | None = None,
    checkpoint: Path | None = None,
) -> Any:
    """The causal LM with LoRA (or all weights trainable), on `device`, its own dropout switched off.

    Args:
        device: that the model will compute on.
        dtype: of DTYPES; overrides the recipe's.
        quantise: apply `model.load_in_4bit`; without it the weights are not quantized.
        random_weights: initialize from the config alone. To measure speed, not to train.
        placement: where its tensors are put in place of `device`; on "meta" they have no values, and only the headers
            of the weight files are read.
        checkpoint: of the run that goes on, where adapters start from a part of the weights.

    Raises:
        UserError: the model cannot be loaded, or lacks modules that the recipe names.
    """
    config = load_config(recipe, random_weights)
    if not recipe.sequence.unpacked:
        choose_backends(recipe.model.attention, text_config(config), device, compute_dtype(recipe, config, dtype))
    quantisation = unquantised(config)
    if quantise and recipe.model.load_in_4bit:
        quantisation = four_bits(device)
    asked = dtype or recipe.model.dtype
    for key in switch_noise_off(config):
        log.warning("%s of the model is set to 0; only lora.dropout is applied", key)
    if getattr(text_config(config), "output_router_logits", False):
        log.warning("output_router_logits of the model is set to false; the loss is that of tokens, by every strategy")
        text_config(config).output_router_logits = False
    placement = placement or device
    if random_weights:
        model = _random_model(recipe, config, asked, placement)
    else:
        model = _pretrained_model(recipe, config, asked, placement, quantisation)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    freeze_idle(model)
    if recipe.lora is not None:
        model = add_lora(model, _start(recipe.lora, random_weights), recipe.training.seed, checkpoint)
        model.active_peft_config.revision = recipe.model.revision  # of the base, which PEFT loads by what is exported
        if recipe.lora.init_lora_weights == "loftq" and getattr(model, "is_loaded_in_4bit", False):
            files = weight_files(recipe.model.name_or_path, recipe.model.revision)
            make_up_for_quantization(model, stored_tensors(files))
    elif model.dtype == torch.float16:
        raise UserError("model.dtype: full fine-tuning in float16 is not supported; use bfloat16 or float32, or lora")
    return model


def _start(lora: LoraSection, random_weights: bool) -> LoraSection:
    """Random weights have no directions to start from that would be worth the time to find them."""
    return lora.model_copy(update={"init_lora_weights": True}) if random_weights else lora


def _pretrained_model(
    recipe: Recipe, config: Any, dtype: str, device: torch.device, quantisation: dict[str, Any]
) -> Any:
    """Each tensor is read to its place, so that the device's memory and the host's never hold the model twice."""
    section = recipe.model
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    try:
        model, fresh = load_pretrained(
            section.name_or_path,
            section.revision,
            config,
            Allowed(tuple(section.allow_missing), tuple(section.allow_unexpected)),
            recipe.training.seed,
            trust_remote_code=section.trust_remote_code,
            dtype="auto" if dtype == "auto" else DTYPES[dtype],
            **placed,
            **quantisation,
        )
    except UserError as error:
        raise UserError(f"model.name_or_path: no weights can be loaded from {error}") from None
    if recipe.lora is not None:
        check_kept(fresh, recipe.lora.modules_to_save or [])
    return model if getattr(model, "is_loaded_in_4bit", False) else model.to(device)


def _random_model(recipe: Recipe, config: Any, dtype: str, device: torch.device) -> Any:
    """Created on its device and in its dtype, so that there is never a second copy or one in float32."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    wanted = compute_dtype(recipe, config, dtype)
    torch.manual_seed(recipe.training.seed)
    with device:
        return auto_class(config).from_config(config, trust_remote_code=recipe.model.trust_remote_code, dtype=wanted)


def switch_noise_off(config: Any) -> list[str]:
    """In place: no dropout and no other noise, which turns share on their common history. Keys that it changed."""
    text = text_config(config)
    noisy = ("dropout", "dropout_prob", "dropout_rate", "pdrop", "layerdrop", "jitter_noise", "jitter_eps")
    inner = {f"{name}.": getattr(text, name, None) for name in ("attn_config", "ffn_config")}  # of DBRX and MPT
    changed = []
    for prefix, part in {"": text, **inner}.items():
        for key, value in list(getattr(part, "__dict__", {}).items()):
            if key.endswith(noisy) and isinstance(value, float) and value > 0:
                setattr(part, key, 0.0)
                changed.append(f"{prefix}{key}")
    return changed

"""A pretrained model with tree attention, loaded as `mtr train` loads it."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

from mtr.integrations.forward import check_exact, give_trees
from mtr.integrations.options import recipe_of
from mtr.model.loading import load_config, load_model, switch_noise_off
from mtr.recipe.sections import Backend


def load(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    attention: Literal["auto", Backend] = "auto",
    max_length: int | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """A causal LM with all its weights, that takes batches of `TreeCollator` and returns their loss.

    Without a batch of trees, as in `generate`, it is the model that transformers loads. PEFT may be put around it.

    Args:
        name_or_path: a folder with safetensors, or a Hub id.
        dtype: of the weights; auto: as they are stored.
        attention: the backend.
        max_length: tokens of the longest turn; the positions that the model was made for if not given.
        device: where the weights are read to; a trainer moves them where it trains.

    Raises:
        UserError: weights are missing or too many, or one pass over a tree would not be exact for this model.
    """
    model_section = {
        "name_or_path": os.path.expanduser(name_or_path),
        "revision": revision,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    recipe = recipe_of("mtr.load", model=model_section, lora=None)
    config = load_config(recipe)
    switch_noise_off(config)  # as load_model does
    check_exact(config, max_length, trust_remote_code)
    model = load_model(recipe, torch.device(device))
    give_trees(model, attention, max_length)
    return model

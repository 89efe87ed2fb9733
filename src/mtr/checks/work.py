"""What training on a conversation takes, from the model's config: how its turns are laid out, and the FLOPs. No weights
are read.
"""

from __future__ import annotations

import logging
import warnings

import torch

from mtr.errors import UserError, one_line
from mtr.model.auto_class import auto_class
from mtr.model.flops import FlopCounter
from mtr.model.strategy import decide, decided
from mtr.recipe.model_config import read_config
from mtr.recipe.sections import Recipe

log = logging.getLogger("mtr")


def as_trained(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with its strategy decided, and what there is to know of that; as it is without a config."""
    try:
        decision = decide(recipe, read_config(recipe.model))
    except (UserError, OSError, ValueError) as error:
        return recipe, (str(error),) if isinstance(error, UserError) else ()
    return decided(recipe, decision), decision.notes


def flop_counter(recipe: Recipe) -> FlopCounter | None:
    """Of the recipe's model, with all weights frozen where there is LoRA; its factors, about a hundredth, are left out.

    Returns:
        None without a config, or without a model that can be made from it: `mtr inspect` needs neither.
    """
    try:
        config = read_config(recipe.model)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = auto_class(config).from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        return FlopCounter(model.requires_grad_(recipe.lora is None))
    except Exception as error:  # code of a model from the Hub may do anything
        log.debug("FLOPs are not counted: %s", one_line(error))
        return None

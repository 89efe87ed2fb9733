"""The model of a recipe as training has it, by its config alone: what counts its FLOPs, and what tells its memory."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mtr.attention.model_parts import freeze_idle, text_config
from mtr.errors import UserError, one_line
from mtr.model.auto_class import auto_class
from mtr.model.config import check_config, vocabulary_size
from mtr.model.flops import FlopCounter, cost_of
from mtr.model.loading import switch_noise_off
from mtr.model.lora import add_lora
from mtr.model.probe import judge
from mtr.model.strategy import decide, decided
from mtr.plan.sizes import Model
from mtr.recipe.model_config import read_config
from mtr.recipe.sections import Recipe
from mtr.tree.packing import BY_TOKENS, Cost

log = logging.getLogger("mtr")


@dataclass(frozen=True)
class Known:
    """What a recipe says of its model, read."""

    recipe: Recipe
    """With its strategy decided, where there is a config."""
    model: Model
    counter: FlopCounter | None = None

    @property
    def cost(self) -> Cost:
        """By which training balances packs."""
        if self.model.config is None:
            return BY_TOKENS
        return cost_of(text_config(self.model.config), trained_whole=self.recipe.lora is None)

    @property
    def vocabulary(self) -> int | None:
        return None if self.model.config is None else vocabulary_size(self.model.config)


def read_model(recipe: Recipe) -> Known:
    """
    Raises:
        UserError: the config is of a model that cannot be trained, or contradicts itself.
    """
    name = recipe.model.name_or_path
    try:
        config = read_config(recipe.model)
        check_config(text_config(config))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        why = f"the config of {name} cannot be used ({one_line(error)})"
        if isinstance(error, OSError) or (Path(name).is_dir() and not (Path(name) / "config.json").exists()):
            why = f"{name} has no config.json"
        return Known(recipe, Model(missing=f"{why}, so FLOPs, memory and time are not known"))
    switch_noise_off(config)
    decision = decide(recipe, config)
    text, trusted = text_config(config), recipe.model.trust_remote_code
    model = Model(
        config,
        layers=int(text.num_hidden_layers),
        routed=bool(getattr(text, "num_experts_per_tok", None)),
        reason=decision.reason,
        inexact=None if decision.strategy == "single_pass" else judge(config, recipe.sequence.max_length, trusted).tree,
    )
    try:
        counter, parameters, trainable = _count(recipe, config)
    except UserError:
        raise
    except Exception as error:  # code of a model from the Hub may do anything
        missing = f"the model cannot be built from the config of {name}: {one_line(error)}"
        return Known(decided(recipe, decision), replace(model, missing=missing))
    return Known(decided(recipe, decision), replace(model, parameters=parameters, trainable=trainable), counter)


def _count(recipe: Recipe, config: Any) -> tuple[FlopCounter, int, int]:
    """The counter, and numbers of parameters: all, and those that are trained."""
    plain = copy.deepcopy(config)
    vars(plain).pop("quantization_config", None)
    silenced = log.disabled
    log.disabled = True  # training says what there is to say of LoRA
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = auto_class(plain).from_config(plain, trust_remote_code=recipe.model.trust_remote_code)
            freeze_idle(model)
            if recipe.lora is not None:
                model = add_lora(
                    model, recipe.lora.model_copy(update={"init_from": None, "init_lora_weights": True}), 0
                )
    finally:
        log.disabled = silenced
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return FlopCounter(model), sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)

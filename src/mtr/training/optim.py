"""Optimizer and learning-rate schedule, under Hugging Face's names."""

from __future__ import annotations

import importlib.util
import math
import warnings
from itertools import chain
from typing import Any

import torch
from torch import nn

from mtr.attention.model_parts import outer_parameters
from mtr.errors import UserError
from mtr.recipe.sections import TrainingSection
from mtr.training.muon import MuonWithAdamW, split

_PACKAGES = {
    "adamw_8bit": "bitsandbytes",
    "paged_adamw_8bit": "bitsandbytes",
    "schedule_free_adamw": "schedulefree",
}
"""What optimizers need that mtr does not bring along."""


def check_optimizer(optim: str) -> None:
    """
    Raises:
        UserError: the package of the optimizer is missing.
    """
    package = _PACKAGES.get(optim)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"training.optim: {optim} needs {package}: pip install 'mtr[optim]'")


def build_optimizer(model: nn.Module, training: TrainingSection) -> torch.optim.Optimizer:
    """Of the weights that are trained, at the start of training.

    Raises:
        UserError: the package of the optimizer is missing.
    """
    check_optimizer(training.optim)
    groups, rate = parameter_groups(model, training), training.learning_rate
    match training.optim:
        case "adamw_torch":
            return torch.optim.AdamW(groups, lr=rate)
        case "adamw_torch_fused":
            return torch.optim.AdamW(groups, lr=rate, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate)
        case "muon":
            return MuonWithAdamW(*split(groups, chain(*outer_parameters(model))), lr=rate)
        case "adafactor":
            return _adafactor(groups, rate)
        case "schedule_free_adamw":
            return _schedule_free(groups, rate)
        case "adamw_8bit" | "paged_adamw_8bit":
            return _in_8_bits(model, groups, rate, paged=training.optim == "paged_adamw_8bit")


def parameter_groups(model: nn.Module, training: TrainingSection) -> list[dict[str, Any]]:
    """Biases, norms and other vectors are not decayed, as in Hugging Face's Trainer. B of adapters may learn faster
    (LoRA+, https://arxiv.org/abs/2402.12354); the first group has training.learning_rate.
    """
    ratio = training.loraplus_lr_ratio
    rates = {False: training.learning_rate, True: training.learning_rate * (ratio or 1)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (faster, decayed): [] for faster in (False, True) for decayed in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[ratio is not None and ".lora_B." in name, parameter.dim() > 1].append(parameter)
    return [
        {"params": parameters, "weight_decay": training.weight_decay if decayed else 0.0, "lr": rates[faster]}
        for (faster, decayed), parameters in groups.items()
        if parameters
    ]


def _adafactor(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    return optimizer


def _schedule_free(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    """Warmed up by the schedule, as every other optimizer, so that the logged learning rate is the one that is used."""
    from schedulefree import AdamWScheduleFree

    optimizer: Any = AdamWScheduleFree(groups, lr=rate)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def _in_8_bits(model: nn.Module, groups: list[dict[str, Any]], rate: float, paged: bool) -> torch.optim.Optimizer:
    """Moments in 8 bits, in blocks; those of small tensors and of embeddings in 32, as in Hugging Face's Trainer."""
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager, PagedAdamW8bit

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: torch.optim.Optimizer = (PagedAdamW8bit if paged else AdamW8bit)(groups, lr=rate)
    return optimizer


def describe_optimizer(optimizer: torch.optim.Optimizer, training: TrainingSection) -> list[str]:
    """What to know of it that one learning rate does not tell."""
    notes, ratio = [], training.loraplus_lr_ratio
    if ratio is not None:
        most = ratio * training.learning_rate
        notes.append(f"LoRA+: B of the adapters learns at {ratio:g} times the logged rate, {most:g} at most")
    if isinstance(optimizer, MuonWithAdamW):
        of_muon, of_adamw = optimizer.sizes
        notes.append(f"muon for {of_muon:,} weights of matrices, AdamW for {of_adamw:,} others")
    return notes


def warmup_steps(training: TrainingSection, num_steps: int) -> int:
    """Below 1 a share of all steps, else a number of steps; at most all steps but the last."""
    return min(_steps(training.warmup_steps, num_steps), num_steps - 1)


def _steps(given: float, num_steps: int) -> int:
    return math.ceil(given * num_steps) if given < 1 else int(given)


def advance(schedule: Any) -> None:
    """Step the schedule; torch would warn where the first step of the run made no update."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        schedule.step()


def build_schedule(optimizer: torch.optim.Optimizer, training: TrainingSection, num_steps: int) -> Any:
    """transformers' schedule; its number of steps to decay may be a share, as that to warm up.

    Raises:
        UserError: warmup and decay do not fit in the run.
    """
    from transformers import get_scheduler

    kwargs: dict[str, Any] = dict(training.lr_scheduler_kwargs)
    warmup = warmup_steps(training, num_steps)
    if "num_decay_steps" in kwargs:
        kwargs["num_decay_steps"] = decay = _steps(kwargs["num_decay_steps"], num_steps)
        if warmup + decay > num_steps:
            raise UserError(
                f"training.lr_scheduler_kwargs: {warmup} steps of warmup and {decay} of decay are more than the run's "
                f"{num_steps}; lower warmup_steps or num_decay_steps, or write them as shares below 1"
            )
    return get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=kwargs,
    )


def restore_schedule(schedule: Any, saved: dict[str, Any]) -> None:
    """Go on where a schedule was; if the run has become longer, at the rates of the longer one from the next step on.

    Args:
        schedule: of the run that goes on, whose optimizer is restored already.
        saved: the state of the schedule that it continues.
    """
    schedule.load_state_dict(saved)
    rates = [
        base * scale(schedule.last_epoch) for base, scale in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates

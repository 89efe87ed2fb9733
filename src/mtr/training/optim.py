"""Optimizer and learning-rate schedule, under Hugging Face's names."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from mtr.recipe.sections import TrainingSection


def build_optimizer(model: nn.Module, training: TrainingSection) -> torch.optim.Optimizer:
    """Biases, norms and other vectors are not decayed, as in Hugging Face's Trainer."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = training.learning_rate
    match training.optim:
        case "adamw_torch":
            return torch.optim.AdamW(groups, lr=rate)
        case "adamw_torch_fused":
            return torch.optim.AdamW(groups, lr=rate, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate)
        case "adafactor":
            from transformers.optimization import Adafactor

            optimizer: torch.optim.Optimizer = Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
            return optimizer


def warmup_steps(training: TrainingSection, num_steps: int) -> int:
    """Below 1 a share of all steps, else a number of steps; at most all steps but the last."""
    given = training.warmup_steps
    return min(math.ceil(given * num_steps) if given < 1 else int(given), num_steps - 1)


def advance(schedule: Any) -> None:
    """Step the schedule; torch would warn where the first step of the run made no update."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        schedule.step()


def build_schedule(optimizer: torch.optim.Optimizer, training: TrainingSection, num_steps: int) -> Any:
    from transformers import get_scheduler

    return get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(training, num_steps),
        num_training_steps=num_steps,
    )

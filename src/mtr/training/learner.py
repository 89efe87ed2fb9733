"""What learns: a model and what updates it, in one record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


@dataclass(frozen=True)
class Learner:
    """A model on its processes, its optimizer and its schedule."""

    model: Any
    """The transformers or PEFT model."""
    tree_model: nn.Module
    """The module that is called: DDP or sharded where there are several processes; its forward is a pack's loss."""
    optimizer: Any
    """As accelerate wraps it: this one makes the updates."""
    raw_optimizer: torch.optim.Optimizer
    """The one inside, whose state checkpoints hold."""
    schedule: Any
    """Of the learning rate."""
    accelerator: Accelerator
    tokenizer: Any

"""What a bench is asked to time, and the model that it times on its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mtr.model.flops import FlopCounter
from mtr.recipe.sections import Backend, Recipe


@dataclass(frozen=True)
class Options:
    """Which cases to time, with which model; all else is in the recipe."""

    attention: tuple[str, ...] = ()
    """Backends instead of the recipe's: the first for the first cases, the others as further cases."""
    all_backends: bool = False
    """Every usable backend as a further case."""
    random_weights: bool = False
    padded: bool = True
    """False skips the padded baseline."""
    versus_trl: bool = False


@dataclass(frozen=True)
class Setup:
    """A model on its device, ready for forward and backward."""

    recipe: Recipe
    options: Options
    device: torch.device
    model: Any
    vocabulary: int
    """Entries of the model's vocabulary."""
    usable: list[Backend]
    """Backends that do no more than the tree's work here."""
    asked: list[list[Backend]]
    """The candidates of each backend that was asked for; the fastest of them is used."""
    counter: FlopCounter
    matrix_rate: dict[str, Any]
    """FLOP/s that matmuls reach on the device."""
    about: dict[str, Any]
    """The part of `mtr bench --json` that describes model and device."""

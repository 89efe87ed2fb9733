"""Whether a recipe's training fits a GPU: bytes, as a range; and settings with which it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtr.plan.gpus import Gpu
from mtr.recipe.sections import Checkpointing, Recipe

CONTEXT = 2**30
"""Bytes that a process holds on a GPU beside tensors: CUDA's context, cuBLAS' workspaces, compiled kernels, NCCL."""


@dataclass(frozen=True)
class Fit:
    """Bytes that one process holds at the height of a step."""

    gpu: Gpu
    tokens: int
    """Of the largest pack."""
    checkpointing: Checkpointing
    weights: int
    state: int
    """Gradients and the state of the optimizer."""
    activations: int
    """Of a pack; or what an update takes, if that is more."""
    share: float
    """Of the memory for activations that they may fill; the rest is fragmentation."""

    @property
    def low(self) -> int:
        """All tensors that are alive at a time."""
        return self.weights + self.state + self.activations

    @property
    def high(self) -> int:
        """With fragmentation and the context."""
        return self.weights + self.state + int(self.activations / self.share) + CONTEXT

    @property
    def fits(self) -> bool:
        return self.high <= self.gpu.memory

    @property
    def in_words(self) -> str:
        """fits, tight (by what the estimate leaves open), does not fit"""
        return "fits" if self.fits else "tight" if self.low + CONTEXT // 2 <= self.gpu.memory else "does not fit"


@dataclass(frozen=True)
class Settings:
    """A recipe that fits a GPU."""

    recipe: Recipe
    fit: Fit
    changes: Mapping[str, Any]
    """What differs from the recipe that was asked about, by key: `training.gradient_checkpointing`."""

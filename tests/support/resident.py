"""What packs of `wide_model` take, by the resident set of a process that has done nothing else."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from mtr.model.checkpointing import checkpoint_activations
from mtr.model.memory import PackMemory, Probe
from mtr.model.tree_model import TreeModel
from mtr.recipe.sections import Checkpointing
from support.fresh import in_fresh_process
from support.models import wide_model

RESIDENT: tuple[Checkpointing, ...] = ("none", "full")


@dataclass(frozen=True)
class Resident:
    memory: dict[Checkpointing, PackMemory]
    """Predicted from packs of 512 and 1,024 tokens."""
    peak: dict[Checkpointing, int]
    """Of a pack of 2,048 tokens."""
    gradients: int
    """Parameters that keep one after a prediction."""
    fitted: tuple[int, PackMemory]
    """Of `Probe.fit_pack(256)`."""


@functools.cache
def resident() -> Resident:
    return in_fresh_process(_measure)


def _measure() -> Resident:
    model = TreeModel(wide_model(), "segment")
    probe = Probe(model, model, torch.device("cpu"))
    memory, peak, gradients = dict[Checkpointing, PackMemory](), dict[Checkpointing, int](), 0
    fitted = probe.fit_pack(256)
    for mode in RESIDENT:
        checkpoint_activations(model.model, mode)
        memory[mode] = probe.measure(1024)
        gradients += sum(parameter.grad is not None for parameter in model.parameters())
        probe.peak(64)  # allocates gradients
        peak[mode] = probe.peak(2048)
    return Resident(memory, peak, gradients, fitted)

"""The loss on held-out data, exact and by source, and which evaluation was the best.

eval_loss = sum(weight * nll) / sum(weight) over all of it, in the strategy of the recipe
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from mtr.data.mixture import Mixture
from mtr.data.opening import open_data
from mtr.data.stream import Stream
from mtr.errors import UserError
from mtr.prepare.builder import Builder
from mtr.prepare.step import Counts
from mtr.prepare.steps import IndexedSteps
from mtr.prepare.workers import iterate_steps
from mtr.recipe.sections import Recipe
from mtr.training.processes import is_sharded, total
from mtr.tree.packing import idle_pack


@dataclass
class Evaluation:
    loss: float
    """In nats."""
    by_source: dict[str, float] = field(default_factory=dict)
    """Where there are several; a source without a trained turn is left out."""
    counts: Counts = field(default_factory=Counts)


def open_eval(recipe: Recipe, held_back: Mixture | None = None) -> dict[str, Mixture]:
    """The sources of `data.eval` by name, or what is held back of the training data; none if there is no evaluation.

    Raises:
        UserError: a source is bad, or a stream.
    """
    if held_back is not None:
        return {"held back": held_back}
    names = _names([source.path for source in recipe.data.eval])
    opened = {}
    for name, source in zip(names, recipe.data.eval, strict=True):
        data = open_data(recipe.data, [source])
        if isinstance(data, Stream):
            raise UserError("data.eval: a Hub stream has no end; set data.streaming to false to evaluate on it")
        opened[name] = data
    return opened


def evaluate(
    model: nn.Module,
    builder: Builder,
    sources: Mapping[str, Mixture],
    accelerator: Accelerator,
    stop: Callable[[], bool],
) -> Evaluation | None:
    """The weighted mean over all evaluation data.

    Args:
        stop: asked after each step, the same on all processes; the evaluation is then given up.

    Raises:
        UserError: no turn of it is trained.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, tuple[float, float]] = {}
    counts = Counts()
    for name, data in sources.items():
        loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        weight_sum = 0.0
        steps = IndexedSteps(builder, data, shuffle=False)
        for step in iterate_steps(steps, range(steps.steps_per_epoch), num_workers=0):
            batches = list(step.batches)
            if is_sharded(model):
                batches += [builder.batch(idle_pack())] * (step.rounds - len(batches))
            with torch.no_grad():
                for batch in batches:
                    loss_sum += model(batch.to(accelerator.device)).detach()
            weight_sum += step.weight_sum
            counts.add(step.counts)
            if stop():
                model.train(was_training)
                return None
        sums[name] = (total(accelerator, loss_sum), weight_sum)
    model.train(was_training)
    whole = sum(weight for _, weight in sums.values())
    if whole == 0:
        raise UserError(f"data.eval: no turn is left to evaluate ({counts.reasons()})")
    by_source = {name: loss / weight for name, (loss, weight) in sums.items() if weight}
    loss = sum(loss for loss, _ in sums.values()) / whole
    return Evaluation(loss, by_source if len(sums) > 1 else {}, counts)


def _names(paths: list[str]) -> list[str]:
    """Short where that tells them apart."""
    short = [Path(path).name for path in paths]
    if len(set(short)) == len(short):
        return short
    return paths if len(set(paths)) == len(paths) else [f"{path} ({i})" for i, path in enumerate(paths, 1)]

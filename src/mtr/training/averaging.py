"""The two sets of weights of a schedule-free optimizer: those that it trains, and their average, which is the result.

training      y, where gradients are taken           checkpoints continue from it
average       x, what the run is for                 evaluated, generated with, saved as adapter or model
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[bool]:
    """Within it, the model has the averages, if the optimizer makes any; after it, what it had, bit for bit.

    Yields:
        Whether the averages are other weights than those that are trained.
    """
    groups = [group for group in optimizer.param_groups if group.get("train_mode")]
    kept = [(p, p.detach().clone()) for group in groups for p in group["params"] if optimizer.state.get(p)]
    if not groups:
        yield False
        return
    optimizer.eval()  # type: ignore[attr-defined]  # of schedulefree
    try:
        yield bool(kept)
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        for group in groups:
            group["train_mode"] = True

"""Any scan over a tree, level by level of its segments: each begins with the state in which the one above it ended.

The number of calls grows with the depth of the tree, so what can be done in chunks is (`mtr.recurrence.states`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtr.recurrence.segments import LevelPlan
from mtr.tree.plan import with_padding

Scan = Callable[[list[Tensor], Any], tuple[Tensor, Tensor]]
"""(inputs [n, L, ...], state [n, ...] or None for the first) -> (out [n, L, ...], state [n, ...] after the last token).
Zeros after the end of a shorter row must leave the state as it is."""


def scan_levels(scan: Scan, inputs: Sequence[Tensor], plan: LevelPlan) -> Tensor:
    """
    Args:
        inputs: [1, T, ...] each

    Returns:
        [1, T, ...], zeros at the padding
    """
    total = inputs[0].shape[1]
    batches = [rows for level in plan.levels for rows in level]
    places = [n * length for (n, length), _ in batches]
    # one gather that is split: the gradient of a slice has the size of the whole
    pieces = zip(*(torch.split(_placed(x[0], plan), places) for x in inputs), strict=True)
    outs, ended = [], None
    for level in plan.levels:
        states = []
        for shape, above in level:
            rows = [torch.unflatten(piece, 0, shape) for piece in next(pieces)]
            out, state = scan(rows, None if above is None or ended is None else ended.index_select(0, above))
            outs.append(out.flatten(0, 1))
            states.append(state)
        ended = torch.cat(states)
    out = torch.cat(outs).index_select(0, plan.back)
    return with_padding(out, total)


def _placed(x: Tensor, plan: LevelPlan) -> Tensor:
    """[T, ...] -> [G, ...]"""
    return torch.cat([x[: plan.num_tokens], x.new_zeros(1, *x.shape[1:])]).index_select(0, plan.gather)

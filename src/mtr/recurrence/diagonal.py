"""Recurrences that are linear and multiply each entry of a state by a number of its own, over a tree, in chunks.

    state after = decay * state before + update          decay and update of all chunks at once, one token after another

A chunk is scanned twice: what it hands on is found from the zero state, what it puts out from the state before it. That
is twice the work of `mtr.recurrence.levels`, in as many steps as a chunk has tokens, however long the paths are: for
devices on which a step costs a launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from mtr.recurrence.chunks import ChunkPlan
from mtr.recurrence.states import decayed_states

Scan = Callable[[list[Tensor], Tensor | None], tuple[Tensor, Tensor]]
"""`mtr.recurrence.levels.Scan`"""
Decay = Callable[[list[Tensor]], Tensor]
"""inputs [n, L, ...] -> [n, ...] what their tokens multiply the state before them by"""


def scan_chunks(scan: Scan, decay: Decay, inputs: Sequence[Tensor], plan: ChunkPlan) -> Tensor:
    """
    Args:
        inputs: [1, T, ...] each

    Returns:
        [1, T, ...], zeros at the padding
    """
    rows = [plan.cut(x) for x in inputs]
    above = [_kept(row[plan.above], plan.before_fork) for row in rows]
    _, update = scan(above, None)
    before = decayed_states(_by_entry(decay(above)), _by_entry(update), plan)
    out, _ = scan([_kept(row, plan.valid) for row in rows], before.view(-1, *update.shape[1:]))
    return plan.joined(out, inputs[0].shape[1])


def _by_entry(states: Tensor) -> Tensor:
    """[n, ...] -> [n, entries, 1, 1]"""
    return states.reshape(len(states), math.prod(states.shape[1:]), 1, 1)


def _kept(rows: Tensor, tokens: Tensor) -> Tensor:
    """Zeros, which leave a state alone, elsewhere."""
    return rows * tokens.view(*tokens.shape, *[1] * (rows.dim() - 2))

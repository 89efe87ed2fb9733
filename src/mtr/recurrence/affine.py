"""States down a tree where each is an affine function of the one above it: in few rounds, however deep the tree is.

    S[n] = decay[n] @ S[above[n]] + update[n]

A round joins the nodes at every second depth with the ones above them. Half of the depths are left, and once these are
known, the others follow from them: about as many products as nodes, whatever the shape of the tree, in 2 log2(depth)
batches.

    depth      0 ─ 1 ─ 2 ─ 3 ─ 4 ─ 5
    round 1    0 ───── 2 ───── 4          1, 3, 5 follow from 0, 2, 4
    round 2    0 ───────────── 4          2 follows from 0
    round 3    0                          4 follows from 0

(`mtr.recurrence.states` takes one depth after another: less work, which is what counts on a CPU.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtr.tree.layout import Ints
from mtr.tree.plan import depths, on_device


class Round(NamedTuple):
    """The nodes that are left, those at even depths first; depths are counted anew in each round."""

    above_even: Tensor
    """[even nodes that are no roots] the odd node above, counted from the first odd one"""
    above_odd: Tensor
    """[odd nodes] the even node above"""


@dataclass(frozen=True)
class Reduction:
    """Nodes of a tree in the order in which `compose` takes them: roots first, odd depths last."""

    num_roots: int
    rounds: tuple[Round, ...]


def reduction(above: Ints, device: torch.device) -> tuple[Ints, Reduction]:
    """
    Args:
        above: the node above each one, -1 at a root; before those below it

    Returns:
        The nodes in the order of the reduction, and it.
    """
    depth = depths(above)
    deepest = int(depth.max())
    halvings = np.where(depth == 0, deepest + 1, _trailing_zeros(depth))
    order = np.argsort(-halvings, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    roots, rounds, ancestor, number = int((depth == 0).sum()), [], above, 0
    while 2**number <= deepest:
        even = int((halvings > number).sum())
        left = order[: even + int((halvings == number).sum())]
        up = place[ancestor[left]]
        rounds.append(Round(on_device(device, up[roots:even] - even), on_device(device, up[even:])))
        ancestor = np.where(ancestor < 0, -1, ancestor[ancestor])
        number += 1
    return order, Reduction(roots, tuple(rounds))


def _trailing_zeros(x: Ints) -> Ints:
    """Of positive numbers: how often each can be halved."""
    found: Ints = np.log2(np.maximum(x & -x, 1)).astype(np.int64)
    return found


def compose(decay: Tensor, update: Tensor, plan: Reduction) -> Tensor:
    """The states of all nodes: S[n] = update[n] at a root, decay[n] @ S[above[n]] + update[n] elsewhere.

    Args:
        decay: [N - roots, H, D, D], or [N - roots, H, 1, 1], a number
        update: [N, H, D, E]

    Returns:
        [N, H, D, E]
    """
    product = torch.mul if decay.shape[-1] == 1 else torch.matmul
    roots, odd = plan.num_roots, []
    for above_even, above_odd in plan.rounds:
        update, odd_update = torch.split(update, [roots + len(above_even), len(above_odd)])
        decay, odd_decay = torch.split(decay, [len(above_even), len(above_odd)])
        odd.append((odd_decay, odd_update))
        if len(above_even):
            top, rest = torch.split(update, [roots, len(above_even)])
            update = torch.cat([top, rest + product(decay, odd_update[above_even])])
            decay = product(decay, odd_decay[above_even])
    state = update
    for (_, above_odd), (odd_decay, odd_update) in zip(reversed(plan.rounds), reversed(odd), strict=True):
        state = torch.cat([state, odd_update + product(odd_decay, state[above_odd])])
    return state

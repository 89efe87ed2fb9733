"""A recurrence over a tree in two calls of a kernel for sequences of many lengths, however deep the tree is.

The state after a segment is an affine function of the state before it, which a call of the kernel gives:

    S_out = M S_in + U

    1  one call over the segments that others continue: U from values and a zero state, M from no values and the identity
    2  the true states, down the tree: products of M, in about 2 log2(depth) rounds of batches (`compose`)
    3  one call over all segments, each from its state

In a forest of separate paths nothing is continued, and the third call is all there is.

A round of `compose` joins the segments at every second depth with the ones above them. Half of the depths are left, and
once these are known, the others follow from them: about as many products as segments, whatever the shape of the tree.

    depth      0 ─ 1 ─ 2 ─ 3 ─ 4 ─ 5
    round 1    0 ───── 2 ───── 4          1, 3, 5 follow from 0, 2, 4
    round 2    0 ───────────── 4          2 follows from 0
    round 3    0                          4 follows from 0

Shapes: S sequences, N of them continued by others; J heads of query and key, H of value and state; D and E the sizes of
key and value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mtr.recurrence.segments import depths, segments
from mtr.tree.layout import Ints
from mtr.tree.mask import Tree
from mtr.tree.plan import on_device


@dataclass(frozen=True)
class Sequences:
    """S runs of tokens, one after another in a row."""

    cu_seqlens: Tensor
    """[S + 1] int64, where each begins and the last one ends"""
    cu_seqlens_cpu: Tensor
    """The same on the host."""

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1


class Scan(Protocol):
    """A gated delta rule over sequences of many lengths."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial: Tensor | None,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            query: [1, T, J, D]
            key: [1, T, J, D]
            value: [1, T, H, E]
            g: [1, T, H], or [1, T, H, D]
            beta: [1, T, H]
            initial: [S, H, D, E], zero where None

        Returns:
            [1, T, H, E] and the states after the last tokens, [S, H, D, E]
        """


# --- plans ------------------------------------------------------------------------------------------------------------


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
    return np.log2(np.maximum(x & -x, 1)).astype(np.int64)


@dataclass(frozen=True)
class SegmentPlan:
    """The segments of a pack as sequences; the padding is one more."""

    every: Sequences
    continued: Sequences | None
    """The N that others continue, in the order of the reduction; None: no segment is."""
    gather: Tensor
    """[tokens of the continued segments]"""
    reduction: Reduction
    before: Tensor
    """[S] which of the continued segments each one continues; N at a root"""
    _starts: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def start(self, heads: int, keys: int, values: int) -> Tensor:
        """[N, H, D, E + D] zeros beside the identity; one for all layers of a size."""
        assert self.continued is not None
        size = heads, keys, values
        if size not in self._starts:
            made = torch.zeros(len(self.continued), heads, keys, values + keys, device=self.gather.device)
            made[..., values:].diagonal(dim1=-2, dim2=-1).fill_(1)
            self._starts[size] = made
        return self._starts[size]


def segment_plan(tree: Tree) -> SegmentPlan:
    found = segments(tree)
    device = tree.subtree_end.device
    inner = np.unique(found.above[found.above >= 0])
    ends = found.end if found.num_tokens == len(tree.parent) else np.append(found.end, len(tree.parent))
    every = _sequences(np.append(0, ends), device)
    place = np.full(len(found.start) + 1, len(inner))  # the last is that of -1
    if not len(inner):
        nothing = on_device(device, inner)
        return SegmentPlan(every, None, nothing, Reduction(0, ()), nothing)
    number = np.full(len(found.start) + 1, -1)
    number[inner] = np.arange(len(inner))
    order, reduced = reduction(number[found.above[inner]], device)
    order = inner[order]
    place[order] = np.arange(len(order))
    gather = np.concatenate([np.arange(found.start[i], found.end[i]) for i in order])
    lengths = (found.end - found.start)[order]
    before = np.append(place[found.above], [len(inner)] * (len(ends) - len(found.end)))
    continued = _sequences(np.append(0, np.cumsum(lengths)), device)
    return SegmentPlan(every, continued, on_device(device, gather), reduced, on_device(device, before))


def _sequences(borders: Ints, device: torch.device) -> Sequences:
    borders = borders.astype(np.int64)
    return Sequences(on_device(device, borders), torch.from_numpy(borders))


# --- states -----------------------------------------------------------------------------------------------------------


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
        update, odd_update = update.split([roots + len(above_even), len(above_odd)])
        decay, odd_decay = decay.split([len(above_even), len(above_odd)])
        odd.append((odd_decay, odd_update))
        if len(above_even):
            top, rest = update.split([roots, len(above_even)])
            update = torch.cat([top, rest + product(decay, odd_update[above_even])])
            decay = product(decay, odd_decay[above_even])
    state = update
    for (_, above_odd), (odd_decay, odd_update) in zip(reversed(plan.rounds), reversed(odd), strict=True):
        state = torch.cat([state, odd_update + product(odd_decay, state[above_odd])])
    return state


# --- delta rules ------------------------------------------------------------------------------------------------------


def delta_rule_by_segments(
    scan: Scan, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, plan: SegmentPlan
) -> Tensor:
    """
    Args:
        query: [1, T, J, D]
        key: [1, T, J, D]
        value: [1, T, H, E]
        g: [1, T, H], or [1, T, H, D]
        beta: [1, T, H]

    Returns:
        [1, T, H, E]
    """
    initial = None
    if plan.continued is not None:
        state = _states_after(scan, plan.continued, key, value, g, beta, plan)
        initial = torch.cat([state, state.new_zeros(1, *state.shape[1:])])[plan.before]
    return scan(query, key, value, g, beta, initial, plan.every)[0]


def _states_after(
    scan: Scan, continued: Sequences, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, plan: SegmentPlan
) -> Tensor:
    """[N, H, D, E] after each segment that others continue."""
    key, value, g, beta = (x.index_select(1, plan.gather) for x in (key, value, g, beta))
    heads, size, keys = value.shape[2], value.shape[3], key.shape[3]
    value = torch.cat([value, value.new_zeros(1, value.shape[1], heads, keys)], -1)
    start = plan.start(heads, keys, size).to(torch.promote_types(key.dtype, torch.float32))
    _, ended = scan(key.detach(), key, value, g, beta, start, continued)
    update, decay = ended.split([size, keys], -1)
    return compose(decay[plan.reduction.num_roots :], update, plan.reduction)

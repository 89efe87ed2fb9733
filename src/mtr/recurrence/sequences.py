"""A delta rule over a tree in two calls of a kernel for sequences of many lengths, however deep the tree is.

The state after a segment is an affine function of the state before it, which a call of the kernel gives:

    S_out = M S_in + U

    1  one call over the segments that others continue: U from a zero state, M from no values and the identity as state
    2  the true states, down the tree (`mtr.recurrence.affine`)
    3  one call over all segments, each from its state

In a forest of separate paths nothing is continued, and the third call is all there is.

Shapes: S sequences, N segments that others continue; J heads of query and key, H of value and state; D and E the sizes
of key and value.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mtr.recurrence.affine import Reduction, compose, reduction
from mtr.recurrence.kernels import Scan, Sequences
from mtr.recurrence.segments import segments
from mtr.tree.layout import Ints
from mtr.tree.mask import Tree
from mtr.tree.plan import on_device


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
    before = np.concatenate([place[found.above], np.full(len(ends) - len(found.end), len(inner))])
    continued = _sequences(np.append(0, np.cumsum(lengths)), device)
    return SegmentPlan(every, continued, on_device(device, gather), reduced, on_device(device, before))


def _sequences(borders: Ints, device: torch.device) -> Sequences:
    borders = borders.astype(np.int64)
    return Sequences(on_device(device, borders), torch.from_numpy(borders))


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
    update, decay = torch.split(ended, [size, keys], -1)
    return compose(decay[plan.reduction.num_roots :], update, plan.reduction)

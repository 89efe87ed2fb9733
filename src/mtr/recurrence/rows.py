"""A state space model over a tree in one call of a kernel for batches of equal length, however deep the tree is.

The tree as rows of at most L tokens, cut at every fork. For each head, what a row reads and leaves is known up to the
state before it, which is weakened by a number that is known beforehand:

    y_t = y0_t + exp(dt A up to t) S_in^T C_t          S_out = exp(dt A of the row) S_in + U

    1  one call over all rows from a zero state gives y0 and U
    2  the true states, down the tree (`mtr.recurrence.affine`)
    3  what the rows read of them is a product

Shapes: N rows of L places, M of them continued by others; H heads of size P; G groups of R heads; states of size n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtr.recurrence.affine import Reduction, compose, reduction
from mtr.recurrence.chunks import Pieces
from mtr.recurrence.kernels import RowScan
from mtr.recurrence.segments import segments
from mtr.tree.layout import Ints
from mtr.tree.mask import Tree
from mtr.tree.plan import on_device

LENGTH = 128
"""Places of a row: 64 of a segment's are empty on average, and each row has a state."""


@dataclass(frozen=True)
class RowPlan(Pieces):
    continued: Tensor | None
    """[M] rows that others continue, in the order of the reduction; None: no row is"""
    reduction: Reduction
    before: Tensor
    """[N] which of the continued rows each one continues; M at a root"""


def row_plan(tree: Tree, length: int = LENGTH) -> RowPlan:
    found = segments(tree)
    device = tree.subtree_end.device
    pieces = [np.arange(s, e, length) for s, e in zip(found.start, found.end, strict=True)]
    first = np.concatenate(pieces)
    end = np.minimum(first + length, np.append(first[1:], found.num_tokens))
    above = _rows_above(np.array([len(piece) for piece in pieces]), found.above)
    token = first[:, None] + np.arange(length)
    valid = token < end[:, None]
    continued = np.unique(above[above >= 0])
    order, reduced, before = continued, Reduction(0, ()), np.zeros(len(first), np.int64)
    if len(continued):
        number = np.full(len(first) + 1, -1)  # the last is that of -1
        number[continued] = np.arange(len(continued))
        order, reduced = reduction(number[above[continued]], device)
        order = continued[order]
        number[order] = np.arange(len(order))
        number[-1] = len(order)
        before = number[above]
    return RowPlan(
        gather=on_device(device, np.minimum(token, end[:, None] - 1).ravel()),
        valid=on_device(device, valid),
        back=on_device(device, np.flatnonzero(valid)),
        continued=on_device(device, order) if len(order) else None,
        reduction=reduced,
        before=on_device(device, before),
    )


def _rows_above(rows: Ints, above: Ints) -> Ints:
    """
    Args:
        rows: [S] of each segment
        above: [S] segment

    Returns:
        [N] row, -1 at a root
    """
    ends = np.cumsum(rows)
    found = np.arange(ends[-1]) - 1
    found[ends - rows] = np.where(above < 0, -1, ends[above] - 1)
    return found


def state_space_by_rows(
    scan: RowScan,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None,  # noqa: N803
    plan: RowPlan,
) -> Tensor:
    """
    Args:
        x: [1, T, H, P]
        dt: [1, T, H], not negative
        A: [H], negative
        B: [1, T, G, n]
        C: [1, T, G, n]
        D: [H]

    Returns:
        [1, T, H, P]
    """
    wide = torch.promote_types(dt.dtype, torch.float32)
    A, step = A.to(wide), plan.cut(dt).to(wide).masked_fill(~plan.valid[..., None], 0)
    rows, keys, queries = (plan.cut(t) for t in (x, B, C))
    out, ended = scan(rows, step, A, keys, queries)
    if plan.continued is not None:
        decay = (step * A).cumsum(1)  # [N, L, H]
        after = decay[:, -1].index_select(0, plan.continued)[plan.reduction.num_roots :].exp()
        state = compose(after[..., None, None], ended.index_select(0, plan.continued), plan.reduction)
        before = torch.cat([state, state.new_zeros(1, *state.shape[1:])])[plan.before]
        out = out + _read(queries, before.to(out.dtype)) * decay.exp()[..., None].to(out.dtype)
    joined = plan.joined(out, x.shape[1])
    return joined if D is None else joined + D[:, None] * x


def _read(queries: Tensor, state: Tensor) -> Tensor:
    """[N, L, G, n], [N, H, n, P] -> [N, L, H, P], heads that share a query in one product"""
    groups, heads = queries.shape[2], state.shape[1]
    joined = torch.unflatten(state, 1, (groups, -1)).transpose(2, 3).flatten(3)  # [N, G, n, R P]
    found = queries.transpose(1, 2) @ joined
    return torch.unflatten(found, -1, (heads // groups, -1)).movedim(1, 2).flatten(2, 3)

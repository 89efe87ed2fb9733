"""Mamba-2's state space (SSD, arXiv 2405.21060) and lightning attention (arXiv 2501.08313) over a tree, in chunks.

For each head a state S [n, P] that a token decays, adds to and reads:

    S = exp(dt A) S + B (dt x)^T          y = S^T C + D x

Lightning attention is the same with dt = 1, A = -slope, B the key, C the query and x the value. Heads that share B and
C form a group, for which their products are taken once.

Shapes: N chunks of L tokens; G groups of R heads; P the size of a head, n of the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtr.recurrence.chunks import ChunkPlan
from mtr.recurrence.states import decayed_states


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """[1, T, H] as the recurrence takes them, from what a mixer hands to its scan."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt.clamp(*limit)


def state_space(
    x: Tensor, dt: Tensor, rate: Tensor, key: Tensor, query: Tensor, skip: Tensor | None, plan: ChunkPlan
) -> Tensor:
    """
    Args:
        x: [1, T, H, P]
        dt: [1, T, H] as `step_sizes` gives them
        rate: [H] A, negative
        key: [1, T, G, n] B
        query: [1, T, G, n] C
        skip: [H] D

    Returns:
        [1, T, H, P] in float32 or float64
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    groups, heads = key.shape[2], x.shape[2]
    inputs, step, keys, queries = (plan.cut(t).to(wide).transpose(1, 2) for t in (x, dt, key, query))
    inputs = torch.unflatten(inputs * step[..., None], 1, (groups, -1))  # [N, G, R, L, P]
    decay = torch.unflatten((step * rate.to(wide)[:, None]).cumsum(-1), 1, (groups, -1))  # [N, G, R, L]

    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~plan.lower, float("-inf")).exp()
    within = ((queries @ keys.mT)[:, :, None] * between) @ inputs

    last = plan.at_fork(decay.movedim(-1, 1))  # [E, G, R]
    kept = (last[..., None] - decay[plan.above]).masked_fill(~plan.before_fork[:, None, None, :], float("-inf")).exp()
    written = keys[plan.above].mT @ _joined_heads(inputs[plan.above] * kept[..., None])  # [E, G, n, R P]
    update = torch.unflatten(written, -1, (heads // groups, -1)).movedim(-2, 2)
    before = decayed_states(last.exp().flatten(1, 2)[..., None, None], update.flatten(1, 2), plan)

    read = queries @ _joined_heads(torch.unflatten(before, 1, (groups, -1)))  # [N, G, L, R P]
    out = within + torch.unflatten(read, -1, (heads // groups, -1)).movedim(-2, 2) * decay.exp()[..., None]
    joined = plan.joined(out.flatten(1, 2).transpose(1, 2), x.shape[1])
    return joined if skip is None else joined + skip[:, None] * x.to(wide)


def _joined_heads(x: Tensor) -> Tensor:
    """[..., R, L, P] -> [..., L, R P]"""
    return x.transpose(-3, -2).flatten(-2)

"""Gated DeltaNet (arXiv 2412.06464) and Kimi Delta Attention (arXiv 2510.26692) over a tree, in chunks.

For each head a state S [D, E] that a token decays, corrects and reads:

    S = exp(g) S + k beta (v - (exp(g) S)^T k)^T          o = S^T q D^-0.5

g is a number a head (Gated DeltaNet) or one for each row of S (Kimi). Inside a chunk all corrections are one triangular
system; its solution gives `new` and `seen`, with which the values that the chunk writes are new - seen @ S, S being the
state before it. All exponents are of differences that are not positive, so nothing overflows however fast it decays.

Shapes: N chunks of C tokens, E of which continue another; J heads of query and key, H of value and state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtr.recurrence.chunks import ChunkPlan
from mtr.recurrence.states import corrected_states

_BLOCK = 16
"""Tokens of a block of a chunk, where each channel decays by itself."""


class _Inputs(NamedTuple):
    """Of all chunks, in float32 or float64."""

    query: Tensor
    """[N, J, 1, C, D]"""
    key: Tensor
    """[N, J, 1, C, D]"""
    value: Tensor
    """[N, J, H / J, C, E]"""
    decay: Tensor
    """[N, J, H / J, C, 1 or D] logarithm of the decay from the chunk's start, the token's own included"""
    beta: Tensor
    """[N, J, H / J, C, 1]"""


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, plan: ChunkPlan, normalize: bool
) -> Tensor:
    """
    Args:
        query: [1, T, J, D]
        key: [1, T, J, D]
        value: [1, T, H, E]
        g: [1, T, H], or [1, T, H, D] where each channel decays by itself; not positive
        beta: [1, T, H]
        normalize: query and key to unit length

    Returns:
        [1, T, H, E]
    """
    given = _chunked(query, key, value, g, beta, plan, normalize)
    within = _pairs_by_channel if g.dim() == 4 else _pairs
    keys, attention = within(given, plan)
    sizes = [value.shape[-1], key.shape[-1]]
    wanted = torch.cat([given.value * given.beta, given.key * (given.decay.exp() * given.beta)], -1)
    solved = torch.linalg.solve_triangular(keys * given.beta, wanted, upper=False, unitriangular=True)
    new, seen = torch.split(solved, sizes, -1)

    last = plan.at_fork(given.decay.movedim(-2, 1))[..., None, :]  # [E, J, H / J, 1, 1 or D]
    kept = (last - given.decay[plan.above]).masked_fill(~plan.before_fork[:, None, None, :, None], float("-inf"))
    writing = (given.key[plan.above] * kept.exp()).mT
    decay, writing, new, seen = (x.flatten(1, 2) for x in (last.exp().mT, writing, new, seen))
    state, written = corrected_states(decay, writing, new, seen, plan)

    reading = (given.query * given.decay.exp()).flatten(1, 2)
    out = reading @ state + attention.flatten(1, 2) @ written
    return plan.joined(out.transpose(1, 2).to(value.dtype), value.shape[1])


def _chunked(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, plan: ChunkPlan, normalize: bool
) -> _Inputs:
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, size = query.shape[2:]
    query, key, value, g, beta = (plan.cut(x).to(wide).transpose(1, 2) for x in (query, key, value, g, beta))
    if normalize:
        query, key = _unit(query), _unit(key)
    decay = g.cumsum(2)
    decay = decay if decay.dim() == 4 else decay[..., None]
    value, decay, beta = (torch.unflatten(x, 1, (heads, -1)) for x in (value, decay, beta))
    return _Inputs(query[:, :, None] * size**-0.5, key[:, :, None], value, decay, beta[..., None])


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _pairs(given: _Inputs, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
    """Decayed products of each key, and of each query, with the keys up to it: [N, J, H / J, C, C] both."""
    difference = given.decay - given.decay.mT
    between = difference.masked_fill(~plan.lower, float("-inf")).exp()
    return (given.key @ given.key.mT) * between, (given.query @ given.key.mT) * between


def _pairs_by_channel(given: _Inputs, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
    """The same where each channel decays by itself: the decay is inside the product over channels.

    Between blocks it is split at the start of the later one, so both factors are at most 1; within a block the
    products are taken with a key for each pair of tokens.
    """
    size = plan.valid.shape[1]
    key, query = (x.expand_as(given.decay) for x in (given.key, given.query))
    rows = []
    for start in range(0, size, _BLOCK):
        here, end = slice(start, start + _BLOCK), min(start + _BLOCK, size)
        decay = given.decay[..., here, :]
        both = torch.stack([key[..., here, :], query[..., here, :]], -2)  # [..., B, 2, D]
        between = (decay[..., :, None, :] - decay[..., None, :, :]).masked_fill(
            ~plan.lower[here, here, None], float("-inf")
        )
        products = [both @ (key[..., None, here, :] * between.exp()).mT]  # [..., B, 2, B]
        if start:
            first = given.decay[..., start - 1 : start, :]
            earlier = key[..., :start, :] * (first - given.decay[..., :start, :]).exp()
            sooner = (both * (decay - first).exp()[..., None, :]).flatten(-3, -2) @ earlier.mT
            products.insert(0, torch.unflatten(sooner, -2, (-1, 2)))
        rows.append(torch.nn.functional.pad(torch.cat(products, -1), (0, size - end)))
    keys, attention = torch.cat(rows, -3).unbind(-2)
    return keys, attention

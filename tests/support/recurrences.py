"""Recurrences as they are defined, token after token: each from the state of its parent, so along each path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(token, state of its parent) -> (output, state)"""


def along_paths(step: Step, first: Tensor, parent: Any) -> Tensor:
    """[1, T, ...]: the outputs, zeros at padding.

    Args:
        first: state above a root
        parent: [T], -1 at a root
    """
    found, used = [], int(np.flatnonzero(parent >= 0)[-1]) + 1
    states: list[Tensor] = []
    for token in range(used):
        above = int(parent[token])
        out, state = step(token, first if above < 0 else states[above])
        found.append(out)
        states.append(state)
    return F.pad(torch.stack(found), (0, 0) * found[0].dim() + (0, len(parent) - used))[None]


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, parent: Any, normalize: bool = False
) -> Tensor:
    """Gated DeltaNet (g: [1, T, H]) and Kimi Delta Attention (g: [1, T, H, D]), shapes as in `mtr.recurrence`."""
    heads, size = value.shape[2], query.shape[3]
    query, key = (x.repeat_interleave(heads // x.shape[2], 2) for x in (query, key))
    if normalize:
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))

    def step(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        decay = g[0, t].exp()
        state = state * (decay[:, None, None] if decay.dim() == 1 else decay[:, :, None])
        seen = torch.einsum("hde,hd->he", state, key[0, t])
        state = state + torch.einsum("hd,he->hde", key[0, t], beta[0, t][:, None] * (value[0, t] - seen))
        return torch.einsum("hde,hd->he", state, query[0, t]) * size**-0.5, state

    return along_paths(step, value.new_zeros(heads, size, value.shape[3]), parent)


def state_space(
    x: Tensor, dt: Tensor, rate: Tensor, key: Tensor, query: Tensor, skip: Tensor | None, parent: Any
) -> Tensor:
    """Mamba-2; x [1, T, H, P], dt [1, T, H], A: rate [H], B: key and C: query [1, T, G, n], D: skip [H]."""
    heads = x.shape[2]
    key, query = (y.repeat_interleave(heads // y.shape[2], 2) for y in (key, query))

    def step(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        written = torch.einsum("hn,hp->hnp", key[0, t], dt[0, t][:, None] * x[0, t])
        state = (dt[0, t] * rate).exp()[:, None, None] * state + written
        return torch.einsum("hnp,hn->hp", state, query[0, t]), state

    out = along_paths(step, x.new_zeros(heads, key.shape[3], x.shape[3]), parent)
    return out if skip is None else out + skip[:, None] * x


def lightning(query: Tensor, key: Tensor, value: Tensor, slope: Tensor, parent: Any) -> Tensor:
    """Lightning attention; query and key [1, T, H, D], value [1, T, H, E], slope [H]."""

    def step(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = (-slope).exp()[:, None, None] * state + torch.einsum("hd,he->hde", key[0, t], value[0, t])
        return torch.einsum("hde,hd->he", state, query[0, t]), state

    return along_paths(step, value.new_zeros(value.shape[2], query.shape[3], value.shape[3]), parent)


def selective_scan(
    x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor | None, parent: Any
) -> Tensor:
    """Mamba-1; x and dt [1, E, T], A: rate [E, S], B: write and C: read [1, S, T], D: skip [E] -> [1, E, T]."""

    def step(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = (dt[0, :, t, None] * rate).exp() * state + (dt[0, :, t] * x[0, :, t])[:, None] * write[0, :, t]
        return state @ read[0, :, t], state

    out = along_paths(step, torch.zeros_like(rate), parent).transpose(1, 2)
    return out if skip is None else out + skip[:, None] * x


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, parent: Any) -> Tensor:
    """[1, channels, T]: of each token and the width - 1 above it, those above a root being zero.

    Args:
        x: [1, channels, T]
        weight: [channels, width]
        bias: [channels]
    """

    def step(t: int, history: Tensor) -> tuple[Tensor, Tensor]:
        history = torch.cat([history[:, 1:], x[0, :, t, None]], -1)
        out = (history * weight).sum(-1)
        return out if bias is None else out + bias, history

    return along_paths(step, torch.zeros_like(weight), parent).transpose(1, 2)


def worst_difference(one: Callable[..., Tensor], other: Callable[..., Tensor], inputs: Sequence[Tensor]) -> float:
    """Of two functions' outputs and of the gradients of all their inputs, relative to the largest entry of each.

    `other` is given the inputs in float64. Gradients are those of a weighted sum with random weights.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out, exact = one(*leaves), other(*doubles)
    assert out.shape == exact.shape
    weight = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((out.double() * weight).sum(), leaves)
    wanted = torch.autograd.grad((exact * weight).sum(), doubles)
    assert all(a.dtype == b.dtype for a, b in zip(found, leaves, strict=True)), "a gradient of another dtype"
    pairs = zip([out, *found], [exact, *wanted], strict=True)
    return max(_relative(a.detach().double(), b.detach()) for a, b in pairs)


def _relative(one: Tensor, other: Tensor) -> float:
    difference = (one - other).abs().max()
    if not torch.isfinite(one).all():
        return float("inf")
    scale = other.abs().max()
    return float(difference / scale) if scale > 0 else float(difference)

"""From chunk to chunk, down the tree: the state before a chunk is an affine function of the state before the one above.

    S[n] = decay[n] @ S[above[n]] + update[n]          a matrix: delta rules
    S[n] = decay[n] * S[above[n]] + update[n]          a number for each head: state space models

`decay` and `update` are known before any state is, so all work but these products is done for all chunks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Descent(Protocol):
    """Which chunk continues which: what a `ChunkPlan` knows."""

    @property
    def num_roots(self) -> int: ...

    @property
    def above(self) -> Tensor: ...

    @property
    def levels(self) -> Sequence[tuple[int, int, Tensor]]: ...


def states(decay: Tensor, update: Tensor, plan: Descent) -> Tensor:
    """The state before each chunk: zero at a root.

    Args:
        decay: [E, H, K, K] or [E, H, 1, 1], of the chunks that continue another
        update: [E, H, K, V]

    Returns:
        [N, H, K, V]
    """
    found: Tensor = _States.apply(decay, update, plan)  # type: ignore[no-untyped-call]
    return found


class _States(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, update: Tensor, plan: Descent) -> Tensor:
        roots = plan.num_roots
        found = torch.cat([update.new_zeros(roots, *update.shape[1:]), update])
        for start, end, above in plan.levels:
            factor = decay[start - roots : end - roots]
            _add_product(found[start:end], factor, found.index_select(0, above))
        ctx.save_for_backward(decay, found)
        ctx.plan = plan
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, found = ctx.saved_tensors
        plan: Descent = ctx.plan
        roots = plan.num_roots
        grad = grad.clone()
        for start, end, above in reversed(plan.levels):
            factor = decay[start - roots : end - roots]
            below = grad[start:end]
            passed = factor * below if decay.shape[-1] == 1 else factor.mT @ below
            grad.index_add_(0, above, passed)
        grad = grad[roots:]
        before = found.index_select(0, plan.above)
        grad_decay = (grad * before).sum((-2, -1), keepdim=True) if decay.shape[-1] == 1 else grad @ before.mT
        return grad_decay, grad, None


def _add_product(out: Tensor, factor: Tensor, state: Tensor) -> None:
    """out += factor @ state, in place"""
    if factor.shape[-1] == 1:
        out.addcmul_(factor, state)
    else:
        out.flatten(0, 1).baddbmm_(factor.flatten(0, 1), state.flatten(0, 1))

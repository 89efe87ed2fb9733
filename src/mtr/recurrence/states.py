"""From chunk to chunk, down the tree: the state before a chunk, from the state before the one that it continues.

    state space    S[n] = decay[n] * S[above[n]] + update[n]
    delta rule     S[n] = decay[n] * S[above[n]] + key[n] @ written[above[n]],     written = new - seen @ S

`decay`, `update`, `key`, `new` and `seen` are known before any state is, so all other work is done for all chunks at
once. Both are functions of autograd with a backward of their own: a node for each level would cost more than its work.

Shapes: N chunks, the roots first, whose state is zero; E = N - roots that continue another; H heads, K and V the sizes
of a state, C tokens of a chunk.
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


def decayed_states(decay: Tensor, update: Tensor, plan: Descent) -> Tensor:
    """
    Args:
        decay: [E, H, 1, 1]
        update: [E, H, K, V]

    Returns:
        [N, H, K, V]
    """
    found: Tensor = _Decayed.apply(decay, update, plan)  # type: ignore[no-untyped-call]
    return found


def corrected_states(decay: Tensor, key: Tensor, new: Tensor, seen: Tensor, plan: Descent) -> tuple[Tensor, Tensor]:
    """
    Args:
        decay: [E, H, K or 1, 1]
        key: [E, H, K, C] with which the chunk above writes
        new: [N, H, C, V] values that a chunk writes if the state before it is zero
        seen: [N, H, C, K] what it reads of that state, to be taken from them

    Returns:
        states [N, H, K, V] and what is written, [N, H, C, V]
    """
    found: tuple[Tensor, Tensor] = _Corrected.apply(decay, key, new, seen, plan)  # type: ignore[no-untyped-call]
    return found


class _Decayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, update: Tensor, plan: Descent) -> Tensor:
        roots = plan.num_roots
        state = torch.cat([update.new_zeros(roots, *update.shape[1:]), update])
        for start, end, above in plan.levels:
            state[start:end].addcmul_(decay[start - roots : end - roots], state.index_select(0, above))
        ctx.save_for_backward(decay, state)
        ctx.plan = plan
        return state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, state = ctx.saved_tensors
        plan: Descent = ctx.plan
        roots = plan.num_roots
        grad = grad.clone()
        for start, end, above in reversed(plan.levels):
            grad.index_add_(0, above, decay[start - roots : end - roots] * grad[start:end])
        grad = grad[roots:]
        return (grad * state.index_select(0, plan.above)).sum((-2, -1), keepdim=True), grad, None


class _Corrected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, decay: Tensor, key: Tensor, new: Tensor, seen: Tensor, plan: Descent
    ) -> tuple[Tensor, Tensor]:
        roots = plan.num_roots
        state = new.new_zeros(*new.shape[:2], seen.shape[-1], new.shape[-1])
        written = new.clone()
        for start, end, above in plan.levels:
            factor, writing = (x[start - roots : end - roots] for x in (decay, key))
            torch.mul(factor, state.index_select(0, above), out=state[start:end])
            _add_product(state[start:end], writing, written.index_select(0, above))
            _add_product(written[start:end], seen[start:end], state[start:end], -1)
        ctx.save_for_backward(decay, key, seen, state, written)
        ctx.plan = plan
        return state, written

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_state: Tensor, grad_written: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        decay, key, seen, state, written = ctx.saved_tensors
        plan: Descent = ctx.plan
        roots = plan.num_roots
        grad_state, grad_written = grad_state.clone(), grad_written.clone()
        for start, end, above in reversed(plan.levels):
            factor, writing = (x[start - roots : end - roots] for x in (decay, key))
            grad = grad_state[start:end]
            _add_product(grad, seen[start:end].mT, grad_written[start:end], -1)
            grad_state.index_add_(0, above, factor * grad)
            grad_written.index_add_(0, above, writing.mT @ grad)
        grad = grad_state[roots:]
        summed = (-1,) if decay.shape[-2] > 1 else (-2, -1)
        grad_decay = (grad * state.index_select(0, plan.above)).sum(summed, keepdim=True)
        grad_key = grad @ written.index_select(0, plan.above).mT
        return grad_decay, grad_key, grad_written, -(grad_written @ state.mT), None


def _add_product(out: Tensor, one: Tensor, other: Tensor, factor: float = 1) -> None:
    """out += factor * one @ other, in place; [n, H, ...] all"""
    out.flatten(0, 1).baddbmm_(one.flatten(0, 1), other.flatten(0, 1), alpha=factor)

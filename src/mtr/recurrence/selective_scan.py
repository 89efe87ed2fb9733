"""The selective scan of Mamba-1 (arXiv 2312.00752, algorithm 2) over a tree, level by level.

For each channel a state h [S] that a token decays, adds to and reads, each entry by a decay of its own:

    h = exp(dt A) h + dt B x          y = C . h + D x

A decay for each entry leaves no matrix product to be had, so rows go token by token, all rows of a batch at once, in
blocks: what does not depend on the state is computed for a block of tokens, and a token is one multiplication and
addition. Of the states only those before a block are kept; the backward makes the others again.

Shapes: n rows of L tokens, K of them in a block; E channels of S state entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[[list[Tensor], Tensor | None], tuple[Tensor, Tensor]]
Along = Callable[[Scan, Callable[[list[Tensor]], Tensor], Sequence[Tensor]], Tensor]
"""(scan, decay, inputs) -> out, along the paths of a tree: `mtr.recurrence.diagonal.scan_chunks` with its plan"""

_BLOCK_ENTRIES = {"cpu": 2**16, "cuda": 2**26}
"""State entries of a block: on a CPU a few such tensors fit its cache."""
_BLOCK_TOKENS = 8
"""At least: the state before each block is kept."""


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """[1, E, T] as the recurrence takes them, in float32 or float64, from what a mixer hands to its scan."""
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if bias is not None:
        dt = dt + bias.to(dt.dtype)[:, None]
    return F.softplus(dt) if softplus else dt


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, along: Along) -> Tensor:  # noqa: N803
    """
    Args:
        x: [1, E, T]
        dt: [1, E, T] as `step_sizes` gives them
        A: [E, S], negative
        B: [1, S, T]
        C: [1, S, T]
        D: [E]

    Returns:
        [1, E, T] in float32 or float64
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)

    def scan(rows: list[Tensor], before: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs, steps, write, read = (row.transpose(0, 1) for row in rows)
        if before is None:
            before = A.new_zeros(inputs.shape[1], *A.shape, dtype=wide)
        out, last = _Scan.apply(inputs, steps, A.to(wide), write, read, before)  # type: ignore[no-untyped-call]
        return out.transpose(0, 1), last

    def decay(rows: list[Tensor]) -> Tensor:
        return (rows[1].sum(1)[..., None] * A.to(wide)).exp()

    by_token = [row.transpose(1, 2).to(wide) for row in (x, dt, B, C)]
    out = along(scan, decay, by_token).transpose(1, 2)
    return out if D is None else out + x * D.to(wide)[:, None]


class _Scan(torch.autograd.Function):
    """x and dt [L, n, E], A [E, S], B and C [L, n, S], state before [n, E, S] -> y [L, n, E], state after [n, E, S]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, before: Tensor) -> Any:  # noqa: N803
        x, dt, B, C = (t.contiguous() for t in (x, dt, B, C))
        ctx.size = _block_size(x, A)
        out, state, starts = torch.empty_like(x), before, []
        for block in _blocks(len(x), ctx.size):
            starts.append(state)
            _, states = _states(x[block], dt[block], A, B[block], state)
            out[block] = (states @ C[block, :, :, None])[..., 0]
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, *starts)
        return out, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, *starts = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grads = grad_x, grad_dt, grad_A, grad_B, grad_C = tuple(torch.empty_like(t) for t in (x, dt, A, B, C))
        grad_A.zero_()
        for block, start in reversed(list(zip(_blocks(len(x), ctx.size), starts, strict=True))):
            decay, states = _states(x[block], dt[block], A, B[block], start)
            grad_C[block] = (grad_out[block, :, None] @ states)[:, :, 0]
            grad_states = grad_out[block, :, :, None] * C[block, :, None]
            grad_states[-1] += grad_state
            for k in range(len(decay) - 1, 0, -1):
                grad_states[k - 1].addcmul_(decay[k], grad_states[k])
            grad_state = decay[0] * grad_states[0]

            written = (grad_states @ B[block, :, :, None])[..., 0]  # of dt x
            grad_x[block] = written * dt[block]
            grad_B[block] = ((x[block] * dt[block])[:, :, None] @ grad_states)[:, :, 0]
            exponent = decay.mul_(grad_states)  # of dt A
            exponent[0] *= start
            exponent[1:] *= states[:-1]
            grad_dt[block] = (exponent * A).sum(-1).addcmul_(written, x[block])
            grad_A += torch.einsum("knes,kne->es", exponent, dt[block])
        return *grads, grad_state


def _states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
    """Decays of a block, and the states after its tokens: [K, n, E, S] both."""
    decay = (dt[..., None] * A).exp_()
    states = (x * dt)[..., None] * B[:, :, None]
    for factor, state in zip(decay, states, strict=True):
        before = state.addcmul_(factor, before)
    return decay, states


def _block_size(x: Tensor, A: Tensor) -> int:  # noqa: N803
    entries = _BLOCK_ENTRIES.get(x.device.type, _BLOCK_ENTRIES["cuda"])
    return max(_BLOCK_TOKENS, entries // max(1, x.shape[1] * A.numel()))


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]

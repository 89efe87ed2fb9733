"""Cross-entropy at predictors only, in chunks: the step's loss is sum(weight * nll) / sum(weight).

Each chunk's logits are made, differentiated and dropped within the forward, so the memory is one chunk's logits and
the gradient of the hidden states, and no logit is computed twice. The head is called as it is: LoRA on it, a bias,
a soft cap and full training of it all work.

    logits -> log p, in float32 -> p, with p - 1 at the target, in the logits' dtype -> gradients by autograd

Rows are independent of each other, so where the head has nothing to train, weights scale the gradient of a hidden
state instead of that of its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

Head = Callable[[Tensor], Tensor]
_LOGITS = 2**26
_TILE = 128
"""Rows of a matmul's tile."""


def chunk_size(vocabulary: int) -> int:
    """Predictors a chunk, in whole tiles: 256 MiB of logits in float32. Each chunk reads all weights of the head."""
    return max(_TILE, min(4096, round(_LOGITS / vocabulary / _TILE) * _TILE))


def weighted_nll(
    hidden: Tensor,
    head: Head,
    parameters: list[nn.Parameter],
    target_id: Tensor,
    weight: Tensor,
    chunk: int,
) -> Tensor:
    """sum(weight * nll), a scalar in float32 (float64 where the model is).

    Args:
        hidden: [N, hidden size] at the predictors.
        head: hidden states to logits.
        parameters: of the head, those that require gradients.
        target_id: [N]
        weight: [N]
        chunk: predictors whose logits exist at the same time.
    """
    if not torch.is_grad_enabled():
        return _sum([_chunk_loss(head, *part) for part in _chunks(hidden, target_id, weight, chunk)], hidden)
    loss: Tensor = _WeightedNLL.apply(hidden, target_id, weight, head, chunk, *parameters)  # type: ignore[no-untyped-call]
    return loss


class _WeightedNLL(torch.autograd.Function):
    """The gradient of each chunk is taken in the forward; the backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target_id: Tensor,
        weight: Tensor,
        head: Head,
        chunk: int,
        *parameters: nn.Parameter,
    ) -> Tensor:
        losses, grad_hidden = [], torch.empty_like(hidden)
        grads: list[Tensor] = []
        start = 0
        for part, target, factor in _chunks(hidden, target_id, weight, chunk):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                logits = head(part)
            nll, log_p = _nll(logits.detach(), target)
            losses.append(_weigh(nll, factor).sum())
            same = log_p.dtype == logits.dtype
            grad_logits = log_p.exp_() if same else torch.exp(log_p, out=torch.empty_like(logits, requires_grad=False))
            del log_p
            grad_logits.scatter_(1, target[:, None], torch.expm1(-nll)[:, None].to(logits.dtype))
            if parameters:
                grad_logits.mul_(factor.to(nll.dtype)[:, None])
            grad_part, *new = torch.autograd.grad(logits, [part, *parameters], grad_logits)
            del logits, grad_logits
            if not parameters:
                grad_part = grad_part * factor.to(nll.dtype)[:, None]
            grad_hidden[start : start + len(part)] = grad_part
            for total, addend in zip(grads, new, strict=False):
                total += addend
            grads = grads or new
            start += len(part)
        ctx.save_for_backward(grad_hidden, *(grads or [torch.zeros_like(p) for p in parameters]))
        return _sum(losses, hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, *grads = ctx.saved_tensors
        scaled = [(grad * scale).to(grad.dtype) for grad in (grad_hidden, *grads)]
        return (scaled[0], None, None, None, None, *scaled[1:])


def _chunks(hidden: Tensor, target_id: Tensor, weight: Tensor, chunk: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(*(torch.split(x, chunk) for x in (hidden, target_id, weight)), strict=True))


def _chunk_loss(head: Head, hidden: Tensor, target_id: Tensor, weight: Tensor) -> Tensor:
    return _weigh(_nll(head(hidden), target_id)[0], weight).sum()


def _nll(logits: Tensor, target_id: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row its target's negative log-likelihood [N], and all log-likelihoods [N, V], in float32 or wider."""
    log_p = log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -log_p.gather(1, target_id[:, None])[:, 0], log_p


def _weigh(nll: Tensor, weight: Tensor) -> Tensor:
    return nll * weight.to(nll.dtype)


def _sum(losses: list[Tensor], hidden: Tensor) -> Tensor:
    if not losses:
        return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return torch.stack(losses).sum()

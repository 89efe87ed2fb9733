"""Cross-entropy at predictors only, in chunks: the step's loss is sum(weight * nll) / sum(weight).

Each chunk's logits are made, differentiated and dropped within the forward, so the memory is one chunk's logits and
the gradient of the hidden states, and no logit is computed twice. The head is called as it is: LoRA on it, a bias,
a soft cap and full training of it all work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Head = Callable[[Tensor], Tensor]
_MOST_LOGITS = 2**25


def chunk_size(vocabulary: int) -> int:
    """Predictors a chunk, so that its logits stay near 128 MiB in float32."""
    return max(64, min(4096, _MOST_LOGITS // vocabulary))


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
        grads = [torch.zeros_like(p) for p in parameters]
        start = 0
        for part, target, factor in _chunks(hidden, target_id, weight, chunk):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = _chunk_loss(head, part, target, factor)
            grad_part, *grad_parameters = torch.autograd.grad(loss, [part, *parameters])
            grad_hidden[start : start + len(part)] = grad_part
            for total, new in zip(grads, grad_parameters, strict=True):
                total += new
            losses.append(loss.detach())
            start += len(part)
        ctx.save_for_backward(grad_hidden, *grads)
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
    logits = head(hidden)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return (cross_entropy(logits, target_id, reduction="none") * weight.to(logits.dtype)).sum()


def _sum(losses: list[Tensor], hidden: Tensor) -> Tensor:
    if not losses:
        return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return torch.stack(losses).sum()

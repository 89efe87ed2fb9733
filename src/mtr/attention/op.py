"""Attention over a tree as one operator, which autograd, checkpointing and torch.compile see as a whole.

    mtr::tree_attention           query, key, value, handle, span  ->  out, lse
    mtr::tree_attention_backward  grad_out, out, lse, ...          ->  gradients of query, key, value

`handle` is a tensor that names the pack (`mtr.attention.masks.TreeHandle`): a compiled layer takes it as an input, so
one graph serves every pack, and a checkpoint policy that keeps `out` and `lse` keeps all that attention computes.
`lse` includes the sinks and carries no gradient: the backward gets by with P = exp(S - lse) and D = rowsum(dO * O).

Shapes: H query heads, K key heads (H a multiple of K), T tokens, D head size, E value head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD = "mtr::tree_attention", "mtr::tree_attention_backward"
"""Implemented in `mtr.attention.interface`."""


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    span: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one layer.

    Args:
        query: [1, H, T, D]
        key: [1, K, T, D]
        value: [1, K, T, E]
        handle: of a `TreeHandle`
        span: index of the layer's span in `TreeAttention.spans`
        scale: of the scores, before `softcap`
        sinks: [H] logits that take part in the softmax and carry no value

    Returns:
        [1, T, H, E]
    """
    out: Tensor = torch.ops.mtr.tree_attention.default(query, key, value, handle, span, scale, softcap, sinks)[0]
    return out


_TAG = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    FORWARD,
    "(Tensor query, Tensor key, Tensor value, Tensor handle, int span, float scale, float? softcap=None, "
    "Tensor? sinks=None) -> (Tensor, Tensor)",
    tags=_TAG,
)
torch.library.define(
    BACKWARD,
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor handle, int span, "
    "float scale, float? softcap=None) -> (Tensor, Tensor, Tensor)",
    tags=_TAG,
)


@torch.library.register_fake(FORWARD)  # type: ignore[untyped-decorator]
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    span: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    lse = query.new_empty(batch, heads, length, dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(batch, length, heads, value.shape[-1]), lse


@torch.library.register_fake(BACKWARD)  # type: ignore[untyped-decorator]
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, handle, ctx.span, ctx.scale, ctx.softcap, sinks = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, handle, sinks, out, lse)


def _gradients(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    query, key, value, handle, sinks, out, lse = ctx.saved_tensors
    grads = torch.ops.mtr.tree_attention_backward.default(
        grad_out, query, key, value, out, lse, handle, ctx.span, ctx.scale, ctx.softcap
    )
    grad_sinks = None
    if sinks is not None and ctx.needs_input_grad[7]:
        share = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp()  # of the softmax, [1, H, T]
        grad_sinks = -(share * (grad_out * out).sum(-1, dtype=lse.dtype).mT).sum((0, 2)).to(sinks.dtype)
    return (*grads, None, None, None, None, grad_sinks)


torch.library.register_autograd(FORWARD, _gradients, setup_context=_keep)
